"""One rule of a recipe: the linears it matches, and what they get."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from qtool.errors import UsageError
from qtool.quantize.artifacts.scheme import LayerScheme, layer_scheme

QUANTIZERS = ("rtn", "gptq", "autoround")
DEFAULT_RANK = 16


class Strict(BaseModel):
    """Plain data: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class QuantizerOptions(Strict):
    """Knobs of the quantizers; each has a measured default.

    Attributes:
        mse_clip: search the clipping range that minimises the weight's squared error, weighted by the inputs' second
            moments where the quantizer knows them. None is on for those that do (GPTQ) and off for those that do not
            (RTN): unweighted, the search clips the very weights that outlier channels meet.
        act_order: GPTQ visits columns by falling Hessian diagonal; groups stay contiguous (static grids).
        damp: GPTQ adds damp × mean(diag H) to the diagonal; escalated, and recorded, when Cholesky fails.
        block_size: GPTQ columns per lazy update.
        start: the quantizer that autoround starts from.
        iterations: autoround's steps for each decoder block.
        batch: calibration sequences in a step.
    """

    mse_clip: bool | None = None
    act_order: bool = True
    damp: float = Field(default=0.3, gt=0, lt=1)
    block_size: int = Field(default=128, ge=1, le=4096)
    start: Literal["gptq", "rtn"] = "gptq"
    iterations: int = Field(default=48, ge=1, le=10_000)
    batch: int = Field(default=1, ge=1, le=64)


@dataclass(frozen=True, kw_only=True)
class TransformChoice:
    """What is done online to the input of a linear before it is quantized.

    Attributes:
        kind: "hadamard" (signed, in blocks) or "quad".
        rank: of "quad": how many directions take the 16-bit side path.
        widest_block: the most channels that a Hadamard block may mix; None leaves it to the transform. A rotation wider
            than a block format's blocks carries the outliers of one into the others (2511.04214): in four blocks
            of SmolLM2-135M, MXFP4 costs 0.057 nats with rotations of 32 channels, 0.067 with 64, 0.097 without.
    """

    kind: str
    rank: int
    widest_block: int | None = None

    def __str__(self) -> str:
        name = f"{self.kind} {self.rank}" if self.kind == "quad" else self.kind
        return name if self.widest_block is None else f"{name} b{self.widest_block}"


class Rule(Strict):
    """One rule: the modules it matches and what they get.

    `transform` and `rank` are TransformChoice's; `runtime_smooth` divides what they leave of an INT4 input by factors
    per block of channels, found in every request ("robust", "published") or in calibration ("frozen"); `low_rank` is
    the rank of a correction of what rounding did to the weight, 0 for none.
    """

    match: str | tuple[str, ...]
    scheme: str
    group_size: int | Literal["channel"] | None = None
    symmetric: bool = True
    activation: str | None = None
    activation_clip: float | None = Field(default=None, gt=0, le=1)
    scale: str | None = None
    transform: Literal["hadamard", "quad"] | None = None
    rank: int = Field(default=DEFAULT_RANK, ge=1, le=512)
    runtime_smooth: Literal["robust", "published", "frozen"] | None = None
    low_rank: int = Field(default=0, ge=0, le=512)
    quantizer: str = "gptq"
    options: QuantizerOptions = Field(default_factory=QuantizerOptions)

    @field_validator("match", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @property
    def patterns(self) -> tuple[str, ...]:
        """The rule's patterns as a tuple."""
        return (self.match,) if isinstance(self.match, str) else self.match

    def layer_scheme(self) -> LayerScheme:
        """The scheme this rule names, filled in; raises UsageError where the combination is not computable, or not by
        this quantizer."""
        scheme = layer_scheme(
            self.scheme,
            group_size=self.group_size,
            symmetric=self.symmetric,
            activation=self.activation,
            activation_clip=self.activation_clip,
            runtime_smooth=self.runtime_smooth,
            scale=self.scale,
        )
        if scheme.weight.format.kind == "float" and self.quantizer == "autoround":
            what = f"quantizer autoround with {self.scheme}"
            raise UsageError(what, "rounds integer weights only", "use quantizer: gptq")
        return scheme

    def transform_choice(self) -> TransformChoice | None:
        """The transform this rule names."""
        if self.transform is None:
            return None
        widest = self.layer_scheme().block_size
        return TransformChoice(kind=self.transform, rank=self.rank, widest_block=widest)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What the recipe decided for one linear: a scheme with a quantizer, or the reason it stays in float."""

    module: str
    scheme: LayerScheme | None
    transform: TransformChoice | None = None
    frozen_smooth: bool = False
    low_rank: int = 0
    quantizer: str = "rtn"
    options: QuantizerOptions = field(default_factory=QuantizerOptions)
    reason: str = ""

    @property
    def static_input(self) -> bool:
        """Whether the input's scale is fixed beforehand."""
        return self.scheme is not None and self.scheme.input is not None and not self.scheme.input.dynamic

    @property
    def needs_calibration(self) -> bool:
        """Whether the linear is quantized from its inputs and their second moments."""
        if self.scheme is None:
            return False
        directions = self.transform is not None and self.transform.kind == "quad"
        return self.quantizer != "rtn" or directions or self.frozen_smooth or self.low_rank > 0
