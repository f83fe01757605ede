"""What the papers and their code say of each placement, as far as no code can know it."""

from .recipe import Recipe

PLACEMENT_RECIPES = {
    "pre_ln": Recipe(
        formula="y = x + F(N(x))",
        training="standard: lr 1e-3 below 1B, 5e-4 at 1B in the C4 ladder, 10% warm-up",
        failure="the stream's variance grows with depth and late layers change little; with plain "
        "init it is a weak baseline, scaled init is the fair one",
        holder="LlamaForCausalLM, as it is; Qwen3ForCausalLM with per-head qk_norm",
    ),
    "post_ln": Recipe(
        formula="y = N(x + F(x))",
        training="a lower lr and a longer warm-up than Pre-LN; a tuned low lr can match it at 400M",
        failure="diverges in depth: the C4 ladder reports it lost from 250M (24 layers) on",
        holder="MiniMaxForCausalLM (alpha 1) if the embedding is normalized; else none",
    ),
    "res_post_ln": Recipe(
        formula="y = x + N(F(x))",
        training="as Pre-LN; OLMo 2 trains it with full-width qk_norm and z-loss",
        failure="weight decay on gains of output norms harms, and these are such by our reading of "
        "an abstract (2605.26895)",
        holder="Olmo2ForCausalLM with full-width qk_norm, Exaone4ForCausalLM with per-head; "
        "without qk_norm none",
        provenance="OLMo 2's z-loss and undecayed embeddings are from memory",
    ),
    "peri_ln": Recipe(
        formula="y = x + N'(F(N(x)))",
        training="lr 2e-3 was best from 400M to 3.2B, as for Pre-LN; gains of N' must be trained",
        failure="a raw embedding of std 0.02 is swamped by branches of RMS 1; weight decay on the "
        "gains of N' harms, by our reading of an abstract (2605.26895)",
        holder="Gemma2ForCausalLM (gain - 1, embedding / sqrt(d)); Gemma3ForCausalLM with qk_norm",
        provenance="training facts from a transcription of the tables; no official code found",
    ),
    "sandwich_ln": Recipe(
        formula="y = x + N'(F(N(x)))",
        training="as Pre-LN; CogView adds fp16 tricks that are not part of the placement",
        failure="a gain over Pre-LN of less than 1% perplexity at 130M and 250M",
        holder="Gemma2ForCausalLM (gain - 1, embedding divided by sqrt(d))",
    ),
    "mix_ln": Recipe(
        formula="first floor(fraction L) layers y = N(x + F(x)), the others y = x + F(N(x))",
        training="fraction 0.25 (7B: 0.0625); short runs: lr 1e-3, 10% warm-up",
        failure="long horizons: the gain vanishes at 400B tokens (550M), and the LNS authors' runs "
        "at 350M and, with a longer schedule, 1B diverge; it also vanishes with a scaled embedding",
        holder="none: Post-LN layers cannot be written as Pre-LN",
    ),
    "deepnorm": Recipe(
        formula="y = N(alpha x + F(x)), alpha = (2L)^(1/4)",
        training="a Post-LN: lr x 5 or init x 0.1 diverges at 581M; without warm-up it trains "
        "(2.87 against 2.84)",
        failure="implementations: inverted init exponent, alpha fixed at 2.8284, a decoder left "
        "Pre-LN (docs/errata.md); at 1B and 200B tokens 2.72 against the OLMo 2 baseline's 2.70",
        holder="MiniMaxForCausalLM if the embedding is normalized; else none",
    ),
    "normformer": Recipe(
        formula="attn: y = x + N'(W_o HeadScale(A(N(x)))); mlp: y = r x + W_down N''(act(N(x)))",
        training="bears a higher lr: 3e-3 where its baseline takes 6e-4 (125M); 750 warm-up steps",
        failure="much of the gain is tolerance of the learning rate: compare at tuned rates",
        holder="none (the head gain alone folds into o_proj)",
    ),
    "lns": Recipe(
        formula="y = x + F(N(x) / sqrt(l)) in layer l = 1..L",
        training="as Pre-LN, with plain init: lr 1e-3, 10% warm-up",
        failure="scaled init adds nothing and costs a little (25.80 against 25.76 at 130M, 20.79 "
        "against 20.35 at 250M); early it trails Pre-LN, so short runs misrank it",
        holder="LlamaForCausalLM: divide both gains of layer l by sqrt(l)",
    ),
    "sub_ln": Recipe(
        formula="y = x + W_o N'(A(N(x))); y = x + W_down N'(act(N(x)))",
        training="as Pre-LN; the init grows the value path by sqrt(log 2L)",
        failure="torchscale multiplies torch's default init, since its Xavier reset is not called",
        holder="BitNetForCausalLM without quantization (heads * head_dim = hidden_size)",
    ),
    "hybrid_norm": Recipe(
        formula="attn: y = x + W_o A(N(q), N(k), N(v)); mlp: y = N(x) + F(N(x))",
        training="lr 3e-4 to 3e-5 cosine; scaled init (normal init suits it less)",
        failure="diverges at lr 1e-3 in SiameseNorm's 1.3B setting; qkv-norm with an ordinary "
        "Pre-LN mlp already reaches its perplexity",
        holder="none",
    ),
    "hybrid_norm_star": Recipe(
        formula="hybrid_norm, but layer 1 is attn: y = x + A_qkv(N(x)), mlp: y = x + F(N(x))",
        training="as hybrid_norm; at 29 layers 19.52 against its 19.67 perplexity",
        failure="the spread to Pre-LN with qk_norm is 0.02 nats at 400B tokens",
        holder="none",
    ),
    "post_pre": Recipe(
        formula="attn: y = N(x + A(x)); mlp: y = x + F(N(x))",
        training="as hybrid_norm, of whose paper it is an ablation",
        failure="no better than Pre-LN with qk_norm at 550M and 400B tokens",
        holder="none",
    ),
    "pre_post": Recipe(
        formula="attn: y = x + A(N(x)); mlp: y = N(x + F(x))",
        training="as hybrid_norm, of whose paper it is an ablation",
        failure="half of its sublayers are Post-LN: mind depth and learning rate",
        holder="none",
    ),
    "residual_dual": Recipe(
        formula="p' = N(p + F(p)), r' = r + F(p); output p + N_f(r)",
        training="between Post-LN and Pre-LN; in fp16 the raw stream is scaled by 0.1",
        failure="two streams double the memory of the residual activations",
        holder="none",
    ),
    "gpas": Recipe(
        formula="h = x + F(N(x)); y = h - SiLU(a) stop_gradient(h), one gate a per layer, first 0",
        training="as its backbone; its repository clips the gates' gradient to 0.01 at 7B",
        failure="without stop-gradient the gain is lost; a > 1.278 flips the sign of the stream; "
        "the published gap is one at embeddings of std 0.632, which shift both arms",
        holder="LlamaForCausalLM: the gates fold into output projections and gains' signs",
    ),
    "keel": Recipe(
        formula="y = N'(alpha x + F(N(x))), alpha = 2L sublayers; layer 1 lighter",
        training="bears high rates: 9e-3 (64 sublayers) to 4.5e-3 (1024), 2500 warm-up steps",
        failure="trails Pre-LN early; not for little data or wide, shallow models, its authors say",
        holder="none in general; with scalar outer gains MiniMaxForCausalLM but for layer 1",
    ),
    "span_norm": Recipe(
        formula="h = N(x + A(x)); y = N'(x + F(h)): the mlp's skip starts at the block's input",
        training="its Scale Init is part of the method; its factor was not found (scaled here)",
        failure="SiameseNorm's authors saw it diverge at lr 2e-3 (1.3B)",
        holder="none",
        provenance="formula from reviews and a third-party implementation of its equations",
    ),
    "siamese_norm": Recipe(
        formula="o = F(N(x + N_y(y))); x' = N_x(x + o / c), y' = y + o",
        training="bears lr 1e-3 to 2e-3 at 1.3B, where Post-LN and HybridNorm diverge",
        failure="paper and code differ in c and in the last norm (docs/errata.md); one seed, and "
        "the margin shrinks with tokens; two streams double the residual activations",
        holder="none",
    ),
    "admin": Recipe(
        formula="y = N(w x + F(x)), w profiled from the variance of the branches",
        training="as Post-LN, after one profiling pass that sets w",
        failure="behind Pre-LN: 130M 27.91 against 26.73 (LNS paper), 250M 24.82 against 23.39 "
        "(another batch setting)",
        holder="none",
        provenance="the numbers at 250M are transcribed",
    ),
    "parallel": Recipe(
        formula="y = x + A(N(x)) + F(N(x))",
        training="as Pre-LN",
        failure="a small loss of quality in small models, repaid in speed by fused projections",
        holder="none among Llama's relatives; GPT-J and Cohere are parallel with other parts",
        provenance="from memory",
    ),
    "bhyt": Recipe(
        formula="y = x + F(N(x)), N bhyt; the mlp's N takes mean(x^2) of the block + c (lam / k)^2",
        training="lam 2 (attn) and 1 (mlp), or 3 and 3; 48 settings were swept",
        failure="c ignores cross terms and tokens and contains the configured length; the gain in "
        "speed fell from 15.8% in the first abstract to 1.6% in the third",
        holder="none",
    ),
    "fixup": Recipe(
        formula="y = x + a W_out(b' + G(W_in(x + b))), no norm in the block; W_out starts at 0",
        training="rests on its init, which comes with it",
        failure="behind every norm in DyT's ViT table (77.2 against 82.3)",
        holder="none: stock classes normalize",
        provenance="init and forward from memory of the paper",
    ),
    "skip_init": Recipe(
        formula="y = x + a F(N(x)), a scalar, initially 0 (LNS paper: 1/sqrt(L))",
        training="as Pre-LN",
        failure="worse than plain Pre-LN in the LNS paper (130M: 27.41 against 26.73)",
        holder="LlamaForCausalLM: a folds into the output projections",
        provenance="the original's a = 0 is from memory",
    ),
    "rezero": Recipe(
        formula="y = x + a F(x), a one scalar per layer, first 0; no norm in the block",
        training="a starts the block as identity; warm-up may be short",
        failure="without any norm the activations are bounded by nothing",
        holder="none: stock classes normalize",
        provenance="from memory of the paper",
    ),
    "layerscale": Recipe(
        formula="y = x + g * F(N(x)), g a vector, initially small",
        training="as Pre-LN",
        failure="worse than plain Pre-LN in the LNS paper (130M: 27.93 against 26.73)",
        holder="LlamaForCausalLM: g scales the rows of the output projections",
        provenance="initial values by depth are from memory",
    ),
    "depth_scaled": Recipe(
        formula="y = x + n^(-power) F(N(x)), n the number of sublayers (or layers), power 1 or 1/2",
        training="as Pre-LN",
        failure="only the abstract was read: no table of language models",
        holder="LlamaForCausalLM (folds into the output projections), GraniteForCausalLM natively",
        provenance="that n counts sublayers and that the norm stays is our reading of the abstract",
    ),
    "completep": Recipe(
        formula="y = x + F(N(x)) / m_L, m_L = L / base_depth, with muP in width",
        training="tune lr, std and decay at the base shape, then keep them; gains undecayed",
        failure="the multiplier without the rules for lr, eps and decay is not CompleteP",
        holder="GraniteForCausalLM natively; LlamaForCausalLM by folding, untied",
    ),
    "sdd": Recipe(
        formula="every linear: a * V x / RMS(V x); stack Post-LN",
        training="lr 3e-4 to 1.5e-5; bears lr * 5, init * 0.1 and no warm-up at 581M",
        failure="one more reduction a linear layer (7 a block); the official code is unreachable",
        holder="none: the divisor depends on the token",
    ),
    "nap": Recipe(
        formula="y = x + W_down(act(N'(W_gate N(x))) * N''(W_up N(x))); |W| as its init expects",
        training="its authors also decay or rescale gains and offsets, which is left out here",
        failure="details come from the abstract: a reading of ours, not a reproduction",
        holder="none: the norms inside the mlp have no place in stock classes",
        provenance="abstract and memory",
    ),
    "ngpt": Recipe(
        formula="y = U(x + |a| * (U(F(x)) - x)), U(z) = z / |z|; unit rows after each step",
        training="lr 1e-3 to 3e-3, no warm-up, no weight decay",
        failure="its rotary code is no rotation, and its baseline kept bf16 parameters, which "
        "widens the published gap (docs/errata.md)",
        holder="none",
    ),
}
