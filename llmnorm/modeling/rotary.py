"""Rotary position embedding (RoPE), rotate-half layout as in Llama.

Tables are computed on use, in float32 or the input's precision if that is higher: nothing is
stored, so nothing can be wiped when a model is built on the meta device.
"""

import torch

Table = tuple[torch.Tensor, torch.Tensor]


def rotary_table(
    position_ids: torch.Tensor, *, head_dim: int, theta: float, dtype: torch.dtype
) -> Table:
    """Cosines and sines of position * theta^(-2i/head_dim).

    Shape: position_ids is (batch, seq); both tables are (batch, seq, head_dim), in `dtype`.

    Source: Su et al., "RoFormer", 2021, arXiv:2104.09864, equation 34.
    """
    compute = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device).to(compute) / head_dim
    angle = position_ids[..., None].to(compute) * (1.0 / theta**exponent)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate(query: torch.Tensor, key: torch.Tensor, table: Table) -> Table:
    """Turn queries and keys by their positions; both are (batch, heads, seq, head_dim).

    They keep their dtypes, also under autocast, where the table has the stream's.
    """
    cos, sin = (part.unsqueeze(1) for part in table)
    turned_query = query * cos + _rotate_half(query) * sin
    turned_key = key * cos + _rotate_half(key) * sin
    return turned_query.to(query.dtype), turned_key.to(key.dtype)
