"""The norms by name, and where each is written.

| name | y, without gain and bias | file |
|---|---|---|
| `rmsnorm` | x / sqrt(mean(x^2) + eps), or x / (rms + eps) | `rmsnorm.py` |
| `simple_rmsnorm` | the same without parameters | `rmsnorm.py` |
| `prmsnorm` | x / (rms of the first p dim features + eps) | `rmsnorm.py` |
| `crmsnorm` | x / sqrt((sum(x^2) + sum(x)^2) / (dim + 1) + eps) | `rmsnorm.py` |
| `layernorm` | (x - mean(x)) / sqrt(var(x) + eps) | `layernorm.py` |
| `l2norm` | x / max(length of x, eps), all features or in groups | `unitnorm.py` |
| `scalenorm` | the same with one learned length, first sqrt(dim) | `unitnorm.py` |
| `fixnorm` | the same with the length sqrt(dim) | `unitnorm.py` |
| `dyt` | tanh(alpha x) | `pointwise.py` |
| `derf` | erf(alpha x + shift) | `pointwise.py` |
| `pointwise` | f(alpha x + shift), f by name | `pointwise.py` |
| `bhyt` | tanh(lam x / (kappa rms)) | `bhyt.py` |
| `seednorm` | x / rms with a gain that depends on the token | `seednorm.py` |
| `tapernorm` | x / rms, fading to a fixed gain | `tapernorm.py` |
| `none` | x | `affine.py` |

All of them stand on `affine.py`: gain, bias, precision. PowerNorm and Unified Normalization see
other tokens while they train; they are in `llmnorm/running_norms.py`, outside this table. Read
`residual.py` next: it says where norms sit.
"""

from .affine import NoNorm
from .bhyt import BHyT
from .layernorm import LayerNorm
from .pointwise import Derf, DyT, Pointwise, alpha_at
from .rmsnorm import CRMSNorm, PRMSNorm, RMSNorm, SimpleRMSNorm
from .seednorm import SeedNorm
from .tapernorm import TaperNorm
from .unitnorm import FixNorm, L2Norm, ScaleNorm

__all__ = [
    "BHyT",
    "CRMSNorm",
    "Derf",
    "DyT",
    "FixNorm",
    "L2Norm",
    "LayerNorm",
    "NoNorm",
    "PRMSNorm",
    "Pointwise",
    "RMSNorm",
    "ScaleNorm",
    "SeedNorm",
    "SimpleRMSNorm",
    "TaperNorm",
    "alpha_at",
]
