"""The settings of each run: from the command line, the library and YAML alike, every error reported at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigError

DtypeName = Literal["float32", "float16", "bfloat16"]
ScopeName = Literal["attention", "attention-block", "ffn", "hybrid", "model", "all"]
DEVICES = r"(cpu|cuda|cuda:\d+(,cuda:\d+)*)"
"""The processor, the first GPU, or numbered ones."""


class Settings(BaseModel):
    """Unknown keys are refused; values are checked on creation."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class MergeConfig(Settings):
    """One merge: ``W = W_base + method(task deltas, strength · safety vector)``."""

    model: str | list[str] = Field(description="the fine-tune: a folder, a Hub id, or a LoRA adapter; several to fuse")
    weights: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        None, description="one a fine-tune, for methods that fuse; 1 each if not given"
    )
    base: str | None = Field(None, description="what it was fine-tuned from; an adapter may name its own")
    vector: str | None = Field(None, description="the safety vector's folder; may be left out when fusing")
    out: str = Field(description="the folder to write")
    method: str = Field("interference", description="see `safegraft methods`")
    strength: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="how much of the vector; the method's own default if not given"
    )
    match_norm: bool | None = Field(
        None, description="take the strength as a share of ‖τ‖ (β·‖τ‖/‖Δ‖), not as a factor; the method's if not given"
    )
    params: dict[str, Any] = Field(default_factory=dict, description="the method's own parameters")
    scope: ScopeName | None = Field(None, description="only the vector's tensors of this scope; all of it if not given")
    calibration: str | None = Field(
        None, description="the folder of `safegraft calibrate`, for methods that need one and no vector"
    )
    mask: str | None = Field(None, description="the folder of `safegraft somf train`, for somf, which needs no vector")
    as_adapter: bool = Field(
        False, description="write a LoRA adapter: an adapter's with the vector inside, or a fine-tune's patch alone"
    )
    rank: int | None = Field(
        None, ge=1, description="most directions a weight of that adapter may have; all if not given"
    )
    dtype: DtypeName | None = Field(None, description="dtype of the output; the fine-tune's if not given")
    device: str = Field(
        "cpu",
        pattern=f"^{DEVICES}$",
        description="where the arithmetic runs: cpu, cuda (the first GPU), cuda:1, or several GPUs as cuda:0,cuda:1",
    )
    workers: int | None = Field(None, ge=1, le=256, description="threads; the number of cores if not given")
    ray: str | None = Field(
        None, min_length=1, description="merge on a Ray cluster: local (started here), auto (this machine's), HOST:PORT"
    )
    resume: bool = False
    force: bool = False
    strict: bool = Field(False, description="make a doubtful lineage an error")

    @property
    def models(self) -> list[str]:
        """Every fine-tune, the first one first."""
        return [self.model] if isinstance(self.model, str) else self.model

    @model_validator(mode="after")
    def _fits(self) -> MergeConfig:
        if not self.models:
            raise ValueError("model: at least one fine-tune must be given")
        if self.weights is not None and len(self.weights) != len(self.models):
            raise ValueError(f"weights: {len(self.weights)} given for {len(self.models)} fine-tune(s); give one each")
        if self.rank is not None and not self.as_adapter:
            raise ValueError(f"rank: {self.rank} is of an adapter; ask for one with as_adapter")
        if self.scope is not None and self.vector is None:
            raise ValueError(f"scope: {self.scope} is of a safety vector, and there is none")
        if self.ray and self.as_adapter:
            raise ValueError("ray: an adapter is put together in one process; leave out ray or as_adapter")
        if self.ray and self.device != "cpu":
            raise ValueError(f"ray: tasks compute on processors, not on {self.device!r}; leave out ray or device")
        if self.as_adapter and self.device != "cpu":
            raise ValueError(f"device: an adapter is put together on processors, not on {self.device!r}; leave it out")
        if self.as_adapter and self.resume:
            raise ValueError("resume: an adapter is written at the end and in one go; start again without it")
        return self


class DistillConfig(Settings):
    """One safety vector: an aligned model minus a surrogate of it that is taught to comply.

    Defaults are those of EnchTable (arXiv:2511.09880, and its released code), but where a description says "ours".
    """

    aligned: str = Field(description="the model that refuses: a folder or Hub id of a chat model")
    data: str = Field(description="starter, a .json, .jsonl, .csv or .parquet file, or a Hub data set")
    out: str = Field(description="the folder to write")
    scope: Literal["attention", "attention-block", "ffn", "hybrid", "model"] = Field(
        "attention", description="what is trained; the paper's for Llama-3-8B, hybrid for Mistral and Qwen2.5"
    )
    layers: str | None = Field(None, description="A:B, only layers A up to and without B; all if not given")
    linearize: Literal["auto", "off"] = Field("auto", description="auto: expand whatever is not linear already")
    lora_rank: int | None = Field(None, ge=1, description="train LoRA factors of this rank: a low-rank vector (ours)")
    epochs: int = Field(4, ge=1)
    lr: float = Field(1e-5, gt=0, allow_inf_nan=False, description="peak rate of AdamW")
    batch: int = Field(16, ge=1, description="rows a step, over all processes")
    micro_batch: int | None = Field(None, ge=1, description="rows at a time on one device (ours)")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps, before a cosine to 0")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="ours; the paper does not say")
    max_length: int = Field(2048, ge=8, description="tokens after which a row is cut")
    samples: int | None = Field(None, ge=1, description="rows to train on; 1000, or the whole starter set")
    seed: int = 0
    allow_fewer: bool = Field(False, description="train on what there is where that is less than samples")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="bfloat16 where a GPU has it")
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    keep: float = Field(0.5, gt=0, le=1, description="share of directions whose triplets are stored")
    check_prompts: int = Field(50, ge=1, description="held-out harmful requests that refusals are counted on (ours)")
    check_tokens: int = Field(32, ge=1, description="length of those answers (ours)")
    probe: str | None = Field(None, description="a benign fine-tune of the aligned model, to measure the overlap with")
    keep_surrogate: str | None = Field(None, description="a folder to keep the de-aligned model in; none if not given")
    names: dict[str, list[str]] = Field(default_factory=dict, description="names of an unknown architecture's parts")
    resumable: bool = Field(False, description="keep the trained weights in a private folder until the run succeeds")
    save_steps: int = Field(50, ge=1, description="steps between these, where the run is resumable")
    resume: bool = False
    force: bool = False


class SafeKeyConfig(Settings):
    """One reasoning model, trained on annotated traces with the SafeKey loss.

    Defaults are the paper's (arXiv:2505.16186), but where a description says "ours".
    """

    model: str = Field(description="the reasoning model: a folder or Hub id")
    data: list[str] = Field(min_length=1, description="folders of `safegraft safekey annotate`")
    out: str = Field(description="the folder to write")
    epochs: int = Field(5, ge=1)
    aux_epochs: int = Field(2, ge=0, description="the last epochs, in which the auxiliary terms count")
    lr: float = Field(1e-5, gt=0, allow_inf_nan=False, description="peak rate of AdamW")
    batch: int = Field(128, ge=1, description="rows a step, over all processes")
    micro_batch: int | None = Field(None, ge=1, description="rows at a time on one device (ours)")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps, before a cosine to 0")
    weight_decay: float = Field(1e-4, ge=0, allow_inf_nan=False)
    max_length: int = Field(8192, ge=8, description="tokens after which a row is cut")
    qmm: float = Field(0.2, ge=0, allow_inf_nan=False, description="λ of query-mask modelling")
    head: float = Field(0.2, ge=0, allow_inf_nan=False, description="λ of the two heads together")
    theta: float = Field(0.5, ge=0, le=1, description="share of the head over U; the rest is that over query and U")
    no_heads: bool = Field(False, description="ablation: without the heads")
    no_qmm: bool = Field(False, description="ablation: without query-mask modelling")
    qmm_unmasked: bool = Field(False, description="ablation: that term with the query in sight")
    detach_heads: bool = Field(False, description="ablation: the model does not learn from the heads")
    lora_rank: int | None = Field(None, ge=1, description="train LoRA factors and add them to the output (ours)")
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    packed: bool = Field(False, description="rows of a batch one after another, without padding (ours)")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="the attention kernel")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="bfloat16 where a GPU has it")
    dtype: DtypeName | None = Field(None, description="dtype of the output; the model's if not given")
    think_template: bool = Field(False, description="add the opening tag to a chat template that has none (ours)")
    max_missing: float = Field(0.1, ge=0, le=1, description="share of rows that may lack spans (ours)")
    save_heads: str | None = Field(None, description="a folder for the heads; they are left out if not given")
    save_steps: int | None = Field(None, ge=1, description="steps between checkpoints; an epoch if not given")
    no_checkpoints: bool = Field(False, description="keep nothing that a stopped run could go on from")
    seed: int = 0
    resume: bool = False
    force: bool = False

    @model_validator(mode="after")
    def _fits(self) -> SafeKeyConfig:
        if self.aux_epochs > self.epochs:
            raise ValueError(f"aux_epochs: {self.aux_epochs} is more than epochs ({self.epochs})")
        if self.no_heads and (self.detach_heads or self.save_heads):
            raise ValueError("no_heads: there is nothing to detach or save; leave out one of them")
        if self.save_heads and not self.aux_epochs:
            raise ValueError("save_heads: without aux_epochs the heads are never trained; leave out one of them")
        if self.no_qmm and self.qmm_unmasked:
            raise ValueError("no_qmm: there is nothing to unmask; leave out one of them")
        if self.no_checkpoints and (self.resume or self.save_steps):
            raise ValueError("no_checkpoints: nothing is kept to resume; leave out one of them")
        return self


class SomfConfig(Settings):
    """One mask: which part of the fine-tunes' changes is safe to keep, learnt by DPO on safety preferences.

    Defaults are those of SOMF (arXiv:2405.09055), but where a description says "ours".
    """

    aligned: str = Field(description="the model that refuses, of which all are fine-tunes: a folder or Hub id")
    model: str | list[str] = Field(description="the fine-tune: a folder, a Hub id, or a LoRA adapter; several to fuse")
    weights: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        None, description="one a fine-tune; 1 each if not given"
    )
    preferences: str = Field(
        "starter", description="starter, on-policy, a .json, .jsonl, .csv or .parquet file, or a Hub data set"
    )
    answer_tokens: int = Field(64, ge=1, description="on-policy: tokens of an answer at most (ours)")
    out: str = Field(description="the folder to write")
    scope: ScopeName = Field("all", description="the weights that get a mask, of those that a fine-tune changed")
    layers: str | None = Field(None, description="A:B, only layers A up to and without B; all if not given")
    granularity: Literal["element", "row", "block"] = Field("element", description="entries that share a logit")
    block: int = Field(64, ge=1, description="side of a block (ours)")
    mask_factors: bool = Field(False, description="mask LoRA factors apart, as published, in place of their product")
    fusion: Literal["sum", "task-arithmetic", "ties", "dare", "mean"] | None = Field(
        None, description="sum of one fine-tune, task-arithmetic of several, if not given"
    )
    scale: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="λ of the fusion; the paper's if not given"
    )
    density: float = Field(0.2, gt=0, le=1, description="ties: share of each change's entries kept")
    drop: float = Field(0.2, ge=0, lt=1, description="dare: share of each change's entries dropped")
    temperature: float = Field(0.5, gt=0, allow_inf_nan=False, description="T of the relaxed mask")
    beta: float = Field(0.1, gt=0, allow_inf_nan=False, description="β of DPO")
    reference: Literal["aligned", "fused"] = Field("aligned", description="DPO's reference, which is frozen (ours)")
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False, description="rate at the start, then down to 0 in a line")
    batch: int = Field(16, ge=1, description="pairs a step")
    micro_batch: int | None = Field(None, ge=1, description="pairs at a time; each draws its own mask (ours)")
    steps: int = Field(1000, ge=1)
    optimizer: Literal["adamw", "adafactor"] = Field("adamw", description="adafactor keeps factored state (ours)")
    logits_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the logits; bfloat16 is rounded at random, lest small steps be lost (ours)"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen weights and the forward pass; auto: bfloat16 where a GPU has it (ours)"
    )
    samples: int | None = Field(None, ge=1, description="pairs to learn from; 5000, or the whole starter set")
    allow_fewer: bool = Field(False, description="learn from what there is where that is less than samples")
    check_pairs: int = Field(32, ge=1, description="pairs held out to tell what the mask does (ours)")
    max_length: int = Field(512, ge=8, description="tokens after which a conversation is cut (ours)")
    seed: int = 0
    names: dict[str, list[str]] = Field(default_factory=dict, description="names of an unknown architecture's parts")
    save_steps: int = Field(100, ge=1, description="steps between checkpoints (ours)")
    resume: bool = False
    force: bool = False

    @property
    def models(self) -> list[str]:
        """Every fine-tune, the first one first."""
        return [self.model] if isinstance(self.model, str) else self.model

    @model_validator(mode="after")
    def _fits(self) -> SomfConfig:
        if not self.models:
            raise ValueError("model: at least one fine-tune must be given")
        if self.weights is not None and len(self.weights) != len(self.models):
            raise ValueError(f"weights: {len(self.weights)} given for {len(self.models)} fine-tune(s); give one each")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch: {self.batch} pairs a step cannot be made of {self.micro_batch} at a time")
        if self.mask_factors and self.granularity != "element":
            raise ValueError(f"granularity: factors are masked by element, not by {self.granularity}")
        if self.mask_factors and self.fusion in ("ties", "dare"):
            raise ValueError(f"fusion: {self.fusion} takes whole changes, and mask_factors masks LoRA factors")
        return self


S = TypeVar("S", bound=Settings)


def load(kind: type[S], file: Path | None, given: dict[str, Any]) -> S:
    """Settings from a YAML file, overridden by ``given`` where that is not None.

    Raises:
        ConfigError: the file is not a YAML mapping, or keys or values are wrong; all of them in one message.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read {file}: {error}") from error
        if not isinstance(loaded, dict):
            raise ConfigError(f"{file} does not hold a mapping of settings")
        values.update(loaded)
    values.update({key: value for key, value in given.items() if value is not None})
    return validated(kind, values)


def validated(kind: type[S], values: dict[str, Any]) -> S:
    """``kind(**values)``, with pydantic's findings as one ConfigError."""
    try:
        return kind(**values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"]) or kind.__name__
            shown = "" if item["type"] in ("missing", "extra_forbidden") else f" (got {item['input']!r})"
            lines.append(f"- {key}: {_plain(item)}{shown}")
        known = ", ".join(kind.model_fields)
        raise ConfigError("settings that cannot be used:\n" + "\n".join(lines), f"Known settings: {known}.") from error


def _plain(item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return "there is no such setting"
    if item["type"] == "missing":
        return "must be given"
    if item["loc"] == ("strength",) and item["type"] == "greater_than_equal":
        return "a negative strength takes safety away, which Safegraft refuses to do; give 0 or more"
    return str(item["msg"])
