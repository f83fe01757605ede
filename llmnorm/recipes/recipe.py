"""What a recipe is: the facts about a scheme that no code holds."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Facts about one norm, placement or way to hold weights.

    What the code knows (init, embedding, final norm, slots, parameters, source) is read from the
    code and stands in no recipe; see `facts.py`.

    Args:
        formula: one line; N is the norm, F a sublayer, L the depth, l the 1-based layer.
        training: learning rate, warm-up and what else its authors set.
        failure: how it is known to fail, or what its published numbers hide.
        holder: the stock Hugging Face class that computes the same function, and how.
        provenance: which of these facts were not read in the paper or its code.
    """

    formula: str
    training: str
    failure: str
    holder: str
    provenance: str = ""

    @property
    def classes(self) -> list[str]:
        """The stock classes that `holder` names; none where it says so."""
        if self.holder.startswith("none"):
            return []
        return list(dict.fromkeys(re.findall(r"\w+ForCausalLM", self.holder)))
