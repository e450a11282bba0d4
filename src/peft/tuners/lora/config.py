"""The config of LoRA (Hu et al. 2021, arXiv 2106.09685) and the options of its variants and starts."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from peft.config import (
    ExcludeModules,
    FanInFanOut,
    LayerSelection,
    ModulesToSave,
    Options,
    RankPatterns,
    TargetModules,
    TrainedBias,
    option,
    patterned,
)
from peft.errors import ConfigError, ConfigTypeError
from peft.peft_types import PeftType, TaskType


def divisor(rank: float, rslora: bool) -> float:
    """What alpha is divided by: B A is scaled by alpha over the rank, or over its root (rsLoRA, arXiv 2312.03732)."""
    return math.sqrt(rank) if rslora else rank


def whole(number: float) -> float:
    """A number as an int where it is one, as configs are written."""
    return int(number) if float(number).is_integer() else float(number)


def rank_fields(ranks: Mapping[str, int], alphas: Mapping[str, float], alpha: str = "lora_alpha") -> dict[str, Any]:
    """The fields of a config that say the rank and the alpha of each module; what its field for alpha is called."""
    given = {module: whole(value) for module, value in alphas.items()}
    return dict(zip(("r", "rank_pattern", alpha, "alpha_pattern"), (*patterned(ranks), *patterned(given))))


@dataclass
class LoraRuntimeConfig(Options):
    """How LoRA runs in this process. It belongs to no adapter and is not saved."""

    ephemeral_gpu_offload: bool = option(
        False, "Has no effect: what an adapter starts from is computed on the device of its base layer."
    )


@dataclass
class LoftQConfig(Options):
    """LoftQ: an initialisation that makes up for the error of quantisation (arXiv 2310.08659)."""

    loftq_bits: int = option(4, "Bits of the quantised base weight.", minimum=1)
    loftq_iter: int = option(1, "How often quantisation and low-rank fit alternate.", minimum=1)


@dataclass
class EvaConfig(Options):
    """EVA: ranks and A from the singular vectors of activations (arXiv 2410.07170)."""

    rho: float = option(2.0, "How far ranks may be redistributed: no layer gets more than rho * r.", minimum=1)
    tau: float = option(
        0.99, "Cosine similarity from which on a singular vector counts as converged.", minimum=0, maximum=1
    )
    use_label_mask: bool = option(True, "Whether tokens without a label are left out of the activations.")
    label_mask_value: int = option(-100, "The label that marks such tokens.")
    whiten: bool = option(False, "Whether the singular vectors are divided by the root of their singular values.")
    adjust_scaling_factors: bool = option(True, "Whether alpha follows the redistributed rank, so the scale stays.")


@dataclass
class CordaConfig(Options):
    """CorDA: a decomposition of the weight that is led by the covariance of inputs (arXiv 2406.05223)."""

    cache_file: str | None = option(None, "File that keeps the decomposed weights between runs.")
    covariance_file: str | None = option(None, "File that keeps the covariances between runs.")
    corda_method: Literal["ipm", "kpm"] = option(
        "ipm",
        "Which directions are trained: 'ipm' those of the new task, 'kpm' those it uses least.",
        choices=("ipm", "kpm"),
    )
    verbose: bool = option(False, "Whether progress is printed.")
    use_float16_for_covariance: bool = option(False, "Whether covariances are kept in half precision.")
    prune_temporary_fields: bool = option(True, "Whether what the preparation left on the modules is removed.")


_GA_DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
_GA_SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@dataclass
class LoraGAConfig(Options):
    """LoRA-GA: A and B from the singular vectors of the first gradient (arXiv 2407.05000)."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = option(
        "ArB2r", "Which singular vectors A and B start from.", choices=_GA_DIRECTIONS
    )
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = option(
        "stable", "How the starting tensors are scaled.", choices=_GA_SCALES
    )
    stable_gamma: int = option(16, "The constant of the 'stable' scale.")


@dataclass
class ArrowConfig(Options):
    """Arrow: routing of tokens over several LoRA adapters by their principal directions (arXiv 2405.11157)."""

    top_k: int = option(3, "How many adapters serve a token.", minimum=1)
    router_temperature: float = option(1.0, "Temperature of the softmax over adapters.", above=0)
    use_gks: bool = option(False, "Whether what adapters know in common is subtracted (GenKnowSub).")
    task_adapter_names: list[str] | None = option(None, "The adapters to route over.")
    gks_adapter_names: list[str] | None = option(None, "The adapters that hold the common knowledge.")
    rng_seed: int | None = option(None, "Has no effect: directions are computed exactly, nothing is drawn.")


@dataclass
class BdLoraConfig(Options):
    """Block-diagonal LoRA: factors made of blocks, for tensor-parallel serving (arXiv 2510.23346)."""

    target_modules_bd_a: list[str] | None = option(None, "Modules whose A is block-diagonal.")
    target_modules_bd_b: list[str] | None = option(None, "Modules whose B is block-diagonal.")
    nblocks: int = option(1, "How many blocks.", minimum=1)
    match_strict: bool = option(True, "Whether every adapted module has to be in one of the two lists.")

    def __post_init__(self) -> None:
        super().__post_init__()
        both = sorted({*(self.target_modules_bd_a or ())} & {*(self.target_modules_bd_b or ())})
        if both:
            raise ConfigError(
                f"BdLoraConfig: {both} are in target_modules_bd_a and in target_modules_bd_b. One of A and B is made "
                "of blocks, the other reads, or writes, all of them; name each module once."
            )


@dataclass
class KasaConfig(Options):
    """KaSA: singular values that weigh the update by what the model knows (arXiv 2412.06071)."""

    beta: float = option(1e-4, "Weight of the penalty on the size of the singular values.")
    gamma: float = option(1e-3, "Weight of the penalty that keeps the factors orthogonal.")


_VELORA_INITS = ("batch_average", "batch_average_once", "random")


@dataclass
class VeloraConfig(Options):
    """VeLoRA: activations kept for the backward as projections of their groups (arXiv 2405.17991)."""

    num_groups: int = option(64, "Into how many groups the features of an activation are cut.", minimum=1)
    scale: float = option(1.0, "Factor on what is rebuilt in the backward.")
    init_type: Literal["batch_average", "batch_average_once", "random"] = option(
        "batch_average", "Where the vector comes from that groups are projected on.", choices=_VELORA_INITS
    )


@dataclass
class MontecloraConfig(Options):
    """MonteCLoRA: low-rank factors drawn from a learned distribution (arXiv 2411.04358)."""

    num_samples: int = option(8, "How many samples are drawn and mixed.", minimum=1)
    use_entropy: bool = option(False, "Whether the sum of the squared weights of the mixture is part of the loss.")
    dirichlet_prior: float = option(0.1, "Concentration of the Dirichlet prior of the mixture.")
    sample_scaler: float = option(1e-4, "Scale of the samples.")
    kl_loss_weight: float = option(1e-5, "Weight of the divergence from the prior in the loss.")
    buffer_size: int = option(
        150, "Has no effect: noise is drawn in the forward, so a seed and gradient checkpointing repeat it.", minimum=1
    )


_INITS = (True, False, "gaussian", "orthogonal", "loftq", "pissa", "olora", "corda", "eva", "lora_ga", "mica")
_PISSA_STEPS = r"pissa_niter_\d+"


def _starts_otherwise() -> bool:
    """Whether some layers start by a ``reset_lora_parameters`` of a third party, which may know starts of its own."""
    layers = sys.modules.get("peft.tuners.lora.layer")  # it imports this module
    return layers is not None and layers.starts_otherwise()


_OF_LAYERS = (
    *("lora_dropout", "use_dora", "lora_bias", "kasa_config"),
    *("use_bdlora", "use_qalora", "monteclora_config", "velora_config"),
    *("alora_invocation_tokens", "arrow_config", "use_gating"),
)


@dataclass
class LoraConfig(TargetModules, ExcludeModules, FanInFanOut, TrainedBias, ModulesToSave, LayerSelection, RankPatterns):
    """Config of LoRA: y' = y + s * drop(x) A^T B^T with s = lora_alpha / r.

    The first choice: the best known trade of quality, cost and tools. Rank 8 to 64 on all linear layers, a
    learning rate ten times that of full fine-tuning; merged, it costs nothing. Its variants (DoRA, rsLoRA, LoftQ
    ...) are fields.
    """

    METHOD: ClassVar[PeftType] = PeftType.LORA
    OWN_BIAS: ClassVar[str] = "lora_only"
    ALPHA: ClassVar[str] = "lora_alpha"

    r: int = option(8, "Rank of the update: the width between A and B.", minimum=1)
    lora_alpha: int = option(8, "Numerator of the scale s = lora_alpha / r that the update is multiplied by.", stuck=0)
    lora_dropout: float = option(0.0, "Probability of dropping an input feature of the update.", minimum=0, below=1)
    use_rslora: bool = option(
        False, "Whether s = lora_alpha / sqrt(r), which keeps the update's size at high ranks (arXiv 2312.03732)."
    )
    init_lora_weights: (
        bool
        | Literal[
            "gaussian",
            "eva",
            "olora",
            "pissa",
            "pissa_niter_[number of iters]",
            "corda",
            "loftq",
            "orthogonal",
            "mica",
        ]
        | None
    ) = option(
        True,
        "How A and B start. True: A uniform, B zero. 'gaussian': A normal, B zero. 'orthogonal': random rows of one "
        "orthogonal matrix for both, for even ranks. False: both random, so the adapter changes the output from the "
        "start; for tests. 'loftq': the weight is rounded to few bits, and the pair fits the rest. 'pissa': the "
        "weight's largest singular values train, the rest of it is the base (arXiv 2404.02948); 'pissa_niter_<n>': "
        "the same by a faster, approximate decomposition. 'olora': the like from its QR decomposition (arXiv "
        "2406.01775). 'corda', 'lora_ga': the like, led by inputs or gradients, which preprocess_corda or "
        "preprocess_loraga take before. 'eva': A from the inputs' singular vectors, by initialize_lora_eva_weights. "
        "Embeddings start plainly in all of these. 'mica': B holds the weight's smallest left singular "
        "vectors and stays so, A starts at zero (arXiv 2604.01694).",
        choices=_INITS,
        pattern=_PISSA_STEPS,
        others=_starts_otherwise,
    )
    megatron_config: dict | None = option(
        None,
        "Given, the parallel layers of Megatron-Core in the model can be adapted; A and B are made of such layers, "
        "with the settings of the layer that they adapt.",
    )
    megatron_core: str | None = option(
        "megatron.core",
        "The package that has the parallel layers, in its module tensor_parallel.",
        needs="megatron_config",
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = option(
        None,
        "Tokens whose embeddings are trained besides: their indices, or a dict of embedding module name -> indices.",
    )
    loftq_config: LoftQConfig | dict = option(
        dict,
        "Options of LoftQ, for init_lora_weights='loftq'.",
        nested=LoftQConfig,
        needs=("init_lora_weights", "loftq"),
    )
    eva_config: EvaConfig | None = option(
        None, "Options of EVA, for init_lora_weights='eva'.", nested=EvaConfig, needs=("init_lora_weights", "eva")
    )
    corda_config: CordaConfig | None = option(
        None,
        "Options of CorDA, for init_lora_weights='corda'.",
        nested=CordaConfig,
        needs=("init_lora_weights", "corda"),
    )
    lora_ga_config: LoraGAConfig | None = option(
        None,
        "Options of LoRA-GA, for init_lora_weights='lora_ga'.",
        nested=LoraGAConfig,
        needs=("init_lora_weights", "lora_ga"),
    )
    use_dora: bool = option(
        False,
        "Whether magnitude and direction of the weight are trained apart (DoRA, arXiv 2402.09353). Slower than LoRA "
        "until merged.",
    )
    velora_config: VeloraConfig | dict | None = option(
        None,
        "Options of VeLoRA, which keeps far less of the activations for the backward pass (arXiv 2405.17991).",
        nested=VeloraConfig,
    )
    alora_invocation_tokens: list[int] | None = option(
        None,
        "Token ids from whose last occurrence in a row on the adapter acts; before, and in rows without them, the "
        "model is its base, whose cache it can share (aLoRA, arXiv 2504.12397). For causal language models.",
    )
    use_qalora: bool = option(
        False,
        "Whether A reads inputs pooled by quantisation group, so that merging moves zero points and rounds nothing "
        "where they are floating point (QA-LoRA, arXiv 2309.14717).",
    )
    qalora_group_size: int = option(16, "Features of a quantisation group of QA-LoRA.", minimum=1, needs="use_qalora")
    monteclora_config: MontecloraConfig | None = option(
        None,
        "Options of MonteCLoRA, whose training draws A from a learned mixture (arXiv 2411.04358). Its loss has one "
        "more part: peft.helpers.MontecloraTrainerMixin adds it.",
        nested=MontecloraConfig,
    )
    layer_replication: list[tuple[int, int]] | None = option(
        None,
        "Ranges [start, end) of layers to stack into a deeper model, whose copies share the base weights and have "
        "adapters of their own: [(0, 4), (2, 6)].",
    )
    runtime_config: LoraRuntimeConfig = option(
        LoraRuntimeConfig, "How LoRA runs in this process; not saved.", nested=LoraRuntimeConfig, transient=True
    )
    lora_bias: bool = option(False, "Whether B has a bias, for files made from full models whose bias differs.")
    target_parameters: list[str] | None = option(
        None,
        "Parameters (not modules) to adapt, by name or end of a name; 2-D, or 3-D stacks of experts: "
        "'mlp.experts.gate_up_proj'.",
        names=list,
    )
    use_bdlora: BdLoraConfig | None = option(
        None,
        "Options of block-diagonal LoRA, whose shards on a tensor-parallel server need no further exchange (arXiv "
        "2510.23346).",
        nested=BdLoraConfig,
    )
    arrow_config: ArrowConfig | None = option(
        None, "Options of an Arrow router; see create_arrow_model.", nested=ArrowConfig
    )
    kasa_config: KasaConfig | None = option(
        None,
        "Options of KaSA, which leaves out what is smallest in the weight and weighs the update by trained singular "
        "values (arXiv 2412.06071).",
        nested=KasaConfig,
    )
    ensure_weight_tying: bool = option(
        False,
        "Whether adapters and trained copies of tied weights (embedding and head) stay tied.",
        lacks="no embedding that is adapted, or trained whole, shares its weight with another module of this model",
    )
    use_gating: bool = option(
        False,
        "Multiply the update of each layer by a gate g in the place of lora_alpha / r: for each sample the mean over "
        "its tokens of sigmoid(w x + b) (UniPELT, arXiv 2110.07577). It cannot be merged.",
        own=True,
    )

    def _register_custom_module(self, mapping: dict[type, type]) -> None:
        """Let modules of these classes be adapted by layers of those: class of a module -> class of its layer.

        They are made as ``layer_cls(module, adapter_name, config=config, **fields)``, with the config's fields as they
        are for that module (``r``, ``lora_alpha``, ...); no file says so.
        """
        self.__dict__["_custom_modules"] = {**self.__dict__.get("_custom_modules", {}), **mapping}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_lora_weights is None:  # as some files have it
            self.init_lora_weights = True
        self._check_combinations()
        self._check_tokens()
        for field, default in (("lora_alpha", 8), ("alpha_pattern", {}), ("use_rslora", False)):
            if self.use_gating and getattr(self, field) != default:
                self._tell_vain(field, "use_gating=True has a gate in the place of lora_alpha / r.")
        if self.layer_replication is not None:
            self.layer_replication = [self._layer_range(pair) for pair in self.layer_replication]

    def _check_combinations(self) -> None:
        name = type(self).__name__
        if (tokens := self.alora_invocation_tokens) is not None:
            numbers = isinstance(tokens, (list, tuple)) and all(type(i) is int and i >= 0 for i in tokens)
            if not numbers or not tokens:
                raise ConfigError(
                    f"{name}: alora_invocation_tokens must be a list of at least one token id, got {tokens!r}. The "
                    "tokenizer gives it: tokenizer.encode(text, add_special_tokens=False)."
                )
            if self.task_type not in (None, TaskType.CAUSAL_LM):
                raise ConfigError(
                    f"{name}: alora_invocation_tokens needs a causal language model, in which what comes later does "
                    f"not change the prefix; got task_type={self.task_type!r}. Leave the tokens out for other tasks."
                )
        if self.init_lora_weights == "orthogonal":
            odd = [r for r in (self.r, *(self.rank_pattern or {}).values()) if r % 2]
            if odd:
                raise ConfigError(f"{name}: orthogonal initialization requires the rank to be even, got {odd[0]}.")
        if self.target_parameters:
            # the update is added to the parameter itself: there is no input to drop and no output to shift or scale
            if field := self.needs_a_layer() or ("fan_in_fan_out" if self.fan_in_fan_out else None):
                raise ConfigError(
                    f"{name}: target_parameters does not work with {field}={getattr(self, field)!r}. Leave "
                    f"{field} out, or adapt these parameters in an adapter of their own."
                )

    def needs_a_layer(self) -> str | None:
        """The first field whose value means something for whole layers only, not for bare parameters; or None."""
        asked = (name for name in _OF_LAYERS if getattr(self, name))
        return next(asked, "init_lora_weights" if self.init_lora_weights == "mica" else None)

    def _check_tokens(self) -> None:
        tokens = self.trainable_token_indices
        for indices in tokens.values() if isinstance(tokens, dict) else [] if tokens is None else [tokens]:
            if not isinstance(indices, (list, tuple)) or not all(type(i) is int and i >= 0 for i in indices):
                raise ConfigTypeError(
                    f"{type(self).__name__}: trainable_token_indices must hold lists of token indices, got "
                    f"{indices!r}."
                )

    def _layer_range(self, pair: Any) -> tuple[int, int]:
        valid = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(i) is int for i in pair)
        if not valid or not 0 <= pair[0] < pair[1]:
            raise ConfigError(
                f"{type(self).__name__}: layer_replication must be pairs (start, end) with 0 <= start < end, got "
                f"{pair!r}."
            )
        return tuple(pair)
