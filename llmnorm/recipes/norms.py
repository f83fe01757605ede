"""What the papers and their code say of each norm and weight axis, as far as no code can know."""

from .recipe import Recipe

_POINTWISE_HOLDER = "none: no stock class has a point-wise function for a norm"

NORM_RECIPES = {
    "layernorm": Recipe(
        formula="w (x - mean) / sqrt(var + eps) + b",
        training="the reference",
        failure="the bias of the final norm has no place in a Llama head",
        holder="LlamaForCausalLM after centring (Pre-LN, no bias); StableLmForCausalLM as it is",
        provenance="StableLm's layout is from memory",
    ),
    "rmsnorm": Recipe(
        formula="w x / sqrt(mean(x^2) + eps)",
        training="the baseline of every table here",
        failure="eps inside or outside the root and the place of the cast differ between codes: "
        "not interchangeable for tiny activations or in bf16",
        holder="LlamaForCausalLM and its relatives, as it is",
    ),
    "prmsnorm": Recipe(
        formula="w x / RMS(first p d features of x)",
        training="as rmsnorm",
        failure="the statistic rests on few features (6.25%: 8 of 128)",
        holder="none: stock classes take all features",
        provenance="p = 6.25% is from memory",
    ),
    "crmsnorm": Recipe(
        formula="z / sqrt((sum z^2 + (sum z)^2) / (d + 1) + eps), the last feature implied",
        training="as rmsnorm without a gain",
        failure="d - 1 stored features fit tensor cores badly",
        holder="LlamaForCausalLM after adding the implied feature back",
    ),
    "scalenorm": Recipe(
        formula="g x / |x|, g scalar, initially sqrt(d)",
        training="as rmsnorm; its paper pairs it with FixNorm and small init",
        failure="one gain for all features",
        holder="LlamaForCausalLM: every gain g / sqrt(d)",
    ),
    "fixnorm": Recipe(
        formula="w / |w| for each word vector",
        training="for embeddings (and the tied head), with the input multiplied by sqrt(d)",
        failure="not a norm for the stream: it has no gain",
        holder="LlamaForCausalLM: bake it into the table, untie the head",
    ),
    "simple_rmsnorm": Recipe(
        formula="sqrt(d) x / |x|",
        training="as rmsnorm without a gain",
        failure="removing gains hurt pre-training in a 2026 study, though they add no expressivity",
        holder="LlamaForCausalLM with gains 1",
    ),
    "l2norm": Recipe(
        formula="g x / |x|, g constant or learned, on groups of features",
        training="for queries and keys: QKNorm starts g at log2(L^2 - L), L the 97.5th percentile "
        "of the training sequences' lengths; with scalar gains weight_init sqrt(g sqrt(head_dim))",
        failure="without a learned g the logits of attention are bounded by its scale",
        holder="Qwen3ForCausalLM for queries and keys: gains sqrt(g / sqrt(head_dim))",
    ),
    "none": Recipe(
        formula="x",
        training="for schemes that control the residual stream without norms",
        failure="under a placement that relies on its norms nothing bounds the stream",
        holder="none: stock classes normalize",
    ),
    "dyt": Recipe(
        formula="w tanh(a x)",
        training="as its baseline at 7B and up; a by width and site (the default table), "
        "learned embedding scale",
        failure="a raw embedding starves tanh; the official code decays a by 0.1; +0.083 and "
        "+0.017 nats against rmsnorm at 374M and 1B, 20 tokens per parameter (BHyT's DyT arms, "
        "whose recipe is not described)",
        holder=_POINTWISE_HOLDER,
    ),
    "derf": Recipe(
        formula="w erf(a x + s) + b",
        training="lr 6e-4 at 124M; a and s undecayed; learned embedding scale",
        failure="with Muon at alpha 0.5 its gap to rmsnorm grows from 0.31 to 0.97 nats (one 1B "
        "run of 1000 steps a cell); alpha 0.3 recovers about 80 %, of which number is unclear",
        holder=_POINTWISE_HOLDER,
        provenance="the Muon numbers are transcribed; its language-model alphas were not found",
    ),
    "pointwise": Recipe(
        formula="w f(a x + s) + b, f one of the Derf paper's candidates",
        training="as derf",
        failure="erf leads the paper's vision tables; scores of ten of the sixteen were not found",
        holder=_POINTWISE_HOLDER,
        provenance="scores transcribed; no candidate but erf and tanh has language-model numbers",
    ),
    "bhyt": Recipe(
        formula="w tanh(l x / (k RMS(x))), k = 10; the final norm stays rmsnorm",
        training="l = 2 (attn), 1 (mlp), or 3 and 3",
        failure="its initial slope is a gain of 0.1 to 0.3, and that control was not run; the "
        "paper's full form estimates the mlp's RMS and ignores cross terms",
        holder="none",
    ),
    "seednorm": Recipe(
        formula="(tanh(x . b) a + w) x / RMS(x)",
        training="as rmsnorm",
        failure="the initial values of a and b were not found (here 1 and 0: it starts as rmsnorm)",
        holder="none: its gain depends on the token",
        provenance="formula transcribed",
    ),
    "tapernorm": Recipe(
        formula="g w RMSNorm(x) + (1 - g) c w' x, g from 1 to 0 by schedule",
        training="g = 1 through warm-up, then cosine to 0; the final norm stays as scale anchor",
        failure="without the final norm cross entropy inflates the stream; 0.7 to 1.8% loss at "
        "1M to 30M parameters",
        holder="none while the final norm stays: Llama has one eps for all norms",
        provenance="from abstracts and a transcription",
    ),
}

OPERATOR_RECIPES = {
    "powernorm": Recipe(
        formula="w x / sqrt(running E[x^2] per channel) + b",
        training="not for training language models: statistics of the batch see the future",
        failure="leaks later tokens and other sequences in training; approximate backward",
        holder="LlamaForCausalLM in float32, once frozen: a fixed affine map",
    ),
    "unified_norm": Recipe(
        formula="w x / sqrt(geometric mean of the last second moments per channel) + b",
        training="not for training language models: statistics of the batch see the future",
        failure="leaks later tokens and other sequences in training; approximate backward",
        holder="LlamaForCausalLM in float32, once frozen: a fixed affine map",
    ),
}

WEIGHT_RECIPES = {
    "unit": Recipe(
        formula="rows along the hidden axis have |w| = 1, again after each step",
        training="part of nGPT: no weight decay, no warm-up",
        failure="without nGPT's learned scales the logits and branches cannot grow",
        holder="that of its placement, as it is",
    ),
    "project": Recipe(
        formula="every so many steps |W| (Frobenius) is set to std sqrt(n), as expected at init",
        training="part of normalize-and-project: gains and offsets are decayed",
        failure="gains that are free to grow undo it",
        holder="that of its placement, as it is",
        provenance="abstract and memory; the expected norm, not the measured initial one, is ours",
    ),
    "weight_norm": Recipe(
        formula="W = g V / |V|, row by row",
        training="as its placement; lengths undecayed",
        failure="with an optimizer that decays V the effective learning rate drifts",
        holder="that of its placement: write W out",
        provenance="from memory of the paper",
    ),
    "lawn": Recipe(
        formula="after a free phase each |W| is frozen and gradients are projected to its sphere",
        training="no weight decay once the norms are frozen",
        failure="the length of the free phase is a setting of its own",
        holder="that of its placement, as it is",
        provenance="from memory of the paper",
    ),
}
