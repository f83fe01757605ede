"""Validation while training: the run's own documents, in the run's precision, on all ranks."""

from collections.abc import Callable

from transformers import PreTrainedModel

from llmnorm.config import RunConfig
from llmnorm.data import Mixture
from llmnorm.evaluation.perplexity import score_documents
from llmnorm.training.precision import Precision
from llmnorm.training.ranks import Ranks


def score_validation(
    model: PreTrainedModel,
    data: Mixture,
    config: RunConfig,
    ranks: Ranks,
    precision: Precision,
    *,
    between: Callable[[], object],
) -> dict[str, float]:
    """Score the validation documents, of which there may be none; return the metrics.

    Args:
        model: as it is trained.
        data: the run's data.
        config: the run file.
        ranks: the processes that share the documents.
        precision: of the forward passes.
        between: called before each batch on every rank; what it raises ends the validation.
    """
    documents = data.validation_documents(config.eval.max_documents)
    if documents is None:
        return {}
    with precision.autocast():
        score = score_documents(
            model,
            documents,
            eos_token_id=data.eos_token_id,
            seq_len=config.data.seq_len,
            batch_size=config.eval.batch_size,
            rank=ranks.rank,
            world=ranks.world,
            between=between,
        )
    return {"val/loss": score.loss, "val/bits_per_byte": score.bits_per_byte}
