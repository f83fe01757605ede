"""The papers of choices that are no class of their own: of the others the docstring names them."""

import re

PAPERS = {
    "weights": {
        "unit": 'Loshchilov et al., "nGPT", 2024, arXiv:2410.01131.',
        "project": 'Lyle et al., "Normalization and effective learning rates in reinforcement '
        'learning", 2024, arXiv:2407.01800.',
        "weight_norm": 'Salimans and Kingma, "Weight Normalization", 2016, arXiv:1602.07868.',
        "lawn": 'Gupta et al., "Logit Attenuating Weight Normalization", 2021, arXiv:2108.05839.',
    },
    "parametrization": {
        "mup": 'Yang et al., "Tensor Programs V", 2022, arXiv:2203.03466.',
    },
    "init": {
        "scaled": 'Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 '
        "(GPT-2).",
        "depth_scaled": 'Sun et al., "The Curse of Depth in Large Language Models", NeurIPS 2025, '
        "arXiv:2502.05795, where it is compared.",
        "deepnorm": 'Wang et al., "DeepNet: Scaling Transformers to 1,000 Layers", 2022, '
        "arXiv:2203.00555.",
        "sub_ln": 'Wang et al., "Foundation Transformers" (Magneto), 2022, arXiv:2210.06423.',
        "small": 'Nguyen and Salazar, "Transformers without Tears", 2019, arXiv:1910.05895.',
        "fixup": 'Zhang et al., "Fixup Initialization: Residual Learning Without Normalization", '
        "ICLR 2019, arXiv:1901.09321.",
    },
}
"""Config field -> name of the choice -> its paper; what is missing has none."""


def arxiv(source: str) -> list[str]:
    """The arXiv numbers in a source."""
    return re.findall(r"arXiv:(\d{4}\.\d{4,5})", source)
