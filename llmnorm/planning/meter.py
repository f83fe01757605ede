"""Count the bytes that tensors hold at every moment, without allocating any of them."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Counts live storages while it is entered inside a `FakeTensorMode`.

    Fake tensors have sizes, lifetimes and a device but no memory. What a kernel allocates inside
    itself is not seen. Of a `DTensor` the local part is counted.

    Args:
        held: tensors that exist already and are not to be counted, such as the parameters.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self._mode = active_fake_mode()
        self._sizes = {local(tensor).untyped_storage()._cdata: 0 for tensor in held}
        self._gone: dict[int, weakref.ref[Any]] = {}
        self._claimed: set[int] = set()
        self._resize: Callable[..., Any] = torch.UntypedStorage.resize_
        self.live = 0
        self.gradients = 0
        self.most = 0
        """The most bytes live at once."""
        self.most_beside_gradients = 0
        """The most bytes live at once without those that `claim_gradient` named."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # comes again with its local tensors
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # which is what happens; its fake would be a new tensor
        try:
            result = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            return 1  # of `float(tensor)`: no optimizer's sizes are known to depend on it
        if active_fake_mode() is self._mode:  # else DTensor is only asking for shapes
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._count(leaf)
            self._note()
        return result

    def __enter__(self) -> "Meter":
        def resize(storage: torch.UntypedStorage, size: int) -> None:  # how FSDP2 lets go
            self._resize(storage, size)
            self._resized(storage._cdata, size)

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment,method-assign]
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self._gone[key] = weakref.ref(storage, lambda _: self._forget(key))

    def _resized(self, key: int, size: int) -> None:
        if key in self._gone:
            self.live += size - self._sizes[key]
            self._sizes[key] = size
            self._note()

    def _forget(self, key: int) -> None:
        size = self._sizes.pop(key)
        del self._gone[key]
        self.live -= size
        if key in self._claimed:
            self._claimed.remove(key)
            self.gradients -= size

    def claim_gradient(self, parameter: Tensor) -> None:
        """Count the gradient that a parameter just got as one (a post-accumulate-grad hook)."""
        assert parameter.grad is not None
        key = local(parameter.grad).untyped_storage()._cdata
        if key not in self._claimed:
            self._claimed.add(key)
            self.gradients += self._sizes[key]

    def _note(self) -> None:
        self.most = max(self.most, self.live)
        self.most_beside_gradients = max(self.most_beside_gradients, self.live - self.gradients)


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
