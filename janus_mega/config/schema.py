"""The dataclasses of a run: data only, each field with meaning and unit.

A run is a YAML of includes and differences over these (`load`), completed by arithmetic (`derive`) and checked as a
whole (`validate`). No methods and no `__post_init__`: a component receives its own section or plain values.
Modules that a stage trains are named by `Module`; everything else stays frozen.
"""

from dataclasses import dataclass, field
from enum import Enum

from data_pipeline.spec import MISSING, DataSpec
from janus_mega.config.schema_model import BackboneConfig as BackboneConfig
from janus_mega.config.schema_model import EncoderConfig as EncoderConfig
from janus_mega.config.schema_model import ImageTokenizerConfig as ImageTokenizerConfig
from janus_mega.config.schema_model import ModelConfig as ModelConfig


class Module(Enum):
    """The parts of a Janus that a stage can train or freeze."""

    text_embedding = "text_embedding"
    understanding_encoder = "understanding_encoder"
    understanding_adaptor = "understanding_adaptor"
    generation_embedding = "generation_embedding"
    generation_adaptor = "generation_adaptor"
    backbone = "backbone"
    text_head = "text_head"
    image_head = "image_head"


class Precision(Enum):
    """Number format of weights and activations; sums, masters and moments are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Backend(Enum):
    """Who owns gradients and optimizer: DeepSpeed ZeRO, or megatron's DistributedOptimizer (state cut over dp)."""

    deepspeed = "deepspeed"
    megatron = "megatron"


class Recompute(Enum):
    """Which activations are computed again in backward instead of kept."""

    none = "none"
    selective = "selective"
    full = "full"


class VerifyLayout(Enum):
    """Whether a layout is compared with one process before the first step of a run."""

    off = "off"
    before_start = "before_start"


class Schedule(Enum):
    """Learning rate after the warm-up."""

    constant = "constant"
    cosine = "cosine"


class HangAction(Enum):
    """When no step ends any more: write a report and go on waiting, or write it and end the job."""

    report = "report"
    abort = "abort"


class LossNormalization(Enum):
    """`per_token`: sum of all labels' losses over one global count. `per_task`: each task's mean times its weight."""

    per_token = "per_token"
    per_task = "per_task"


class OptimizerState(Enum):
    """At a stage's start. `fresh`: moments of zero. `carry`: those of init_from, where a parameter trained before."""

    fresh = "fresh"
    carry = "carry"


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How a job is cut over ranks; dp_size is derived (world / (tp * pp))."""

    tp_size: int = 1
    """Tensor-parallel ranks."""
    pp_size: int = 1
    """Pipeline-parallel ranks."""
    virtual_pp_size: int = 1
    """Chunks per pipeline rank; above 1 the schedule interleaves them, which shortens the pipeline's idle ends."""
    pipeline_layers: list[int] = field(default_factory=list)
    """Decoder layers of every chunk in the order of the stream; empty splits by cost, since the encoder weighs on the
    first chunk and both heads on the last."""
    sequence_parallel: bool = False
    """Cut activations between tp blocks along the sequence; needs tp_size > 1."""
    tp_sums_in_fp32: bool = True
    """Sum what tp ranks compute of one activation or gradient in fp32 and round the sum, as one process does; off, bf16
    parts are summed, which moves a third less over tp and lets it change the numbers three times as much."""
    backend: Backend = Backend.deepspeed
    """Whose gradient reduction and optimizer train the model; they agree, checkpoints fit both."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage: 1, or 2 and 3 at pp_size 1; the megatron backend is always stage 1."""
    micro_batch_size: int = 1
    """Rows per forward pass of one dp rank."""
    recompute: Recompute = Recompute.none
    """Activation recomputation."""
    precision: Precision = Precision.bf16
    """Number format of weights and activations."""
    torch_threads: int = 0
    """Intra-op threads per rank on CPU; 0 leaves torch's default."""
    check_calls: bool = False
    """Ask after every forward pass whether all dp ranks have called every trainable module, and stop with the names of
    module and rank if not; costs a small reduction and a host synchronisation per micro-batch."""
    verify_layout: VerifyLayout = VerifyLayout.off
    """`before_start` first trains a shrunken copy, in this layout and in one process; the run starts if they agree."""
    compile: bool = False
    """Compile each decoder layer with torch.compile, attention excepted; the first step then takes minutes."""
    split_encoder: bool = False
    """Deal the images of a micro-batch over tp ranks, gather the features and sum the encoder's gradients over tp;
    otherwise every tp rank encodes them all. Needs tp_size > 1."""
    encode_ahead: int = 0
    """Images at a time for which a frozen understanding encoder runs before the schedule, over all micro-batches of the
    step; 0 lets each micro-batch encode its own. The step then holds all their features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = MISSING
    """Peak learning rate."""
    schedule: Schedule = Schedule.constant
    """Shape after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    min_lr_ratio: float = 0.0
    """Where cosine ends, as a share of lr."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; norms, biases and other vectors are never decayed."""
    beta1: float = 0.9
    """AdamW's first decay."""
    beta2: float = 0.95
    """AdamW's second decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad_norm: float = 1.0
    """Global gradient norm is clipped to this; 0 switches clipping off."""
    lr_scales: dict[str, float] = field(default_factory=dict)
    """Factor on lr by module name (see Module), 1.0 where absent."""
    ema_decay: float = 0.0
    """Share of the old value in a moving average of the weights, updated with them and saved beside them (0.9999 is
    usual); 0 keeps no average."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One stage of training: what trains, how long, from which weights."""

    name: str = MISSING
    """Stage name, for example stage1."""
    trainable: list[Module] = field(default_factory=list)
    """Modules that train; all others are frozen."""
    num_steps: int = MISSING
    """Optimizer steps the schedule is made for."""
    stop_at_step: int = 0
    """Step after which the run ends earlier than planned; 0 means num_steps (Janus-Pro stops stage II this way)."""
    global_batch_size: int = MISSING
    """Rows per optimizer step over all dp ranks."""
    init_from: str = ""
    """Checkpoint directory whose weights start this stage; empty means a fresh initialisation."""
    optimizer_state: OptimizerState = OptimizerState.fresh
    """What becomes of the optimizer state in init_from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """How the three tasks' losses become one number."""

    normalization: LossNormalization = LossNormalization.per_token
    """See LossNormalization; formulas in models/losses.py."""
    task_weights: dict[str, float] = field(
        default_factory=lambda: {"text": 1.0, "understanding": 1.0, "generation": 1.0}
    )
    """Weight of each task: multiplies its sum (per_token) or its mean (per_task)."""
    chunk_tokens: int = 4096
    """Labelled positions scored at a time; bounds the memory of logits."""
    z_loss: float = 0.0
    """Weight of log(sum(exp(logits)))^2, added to every label's cross entropy in training and so part of the losses it
    reports (validation reports cross entropy alone); keeps logits from drifting, 1e-4 is usual; 0 is off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """What a run tells, and how often."""

    log_every: int = 10
    """Steps between metric lines."""
    tensorboard: bool = True
    """Also write TensorBoard events."""
    task_gradients_every: int = 0
    """Steps between gradient norms of the backbone per task and the cosine of understanding and generation, from extra
    backward passes over one micro-batch (kept without recomputation); 0 never."""
    wandb: str = ""
    """Project of Weights & Biases to write to as well; empty switches it off."""
    peak_flops: float = 0.0
    """FLOP/s of one device that utilisation is a share of; 0 takes the dense bf16 peak of the device's name, where it
    is known."""
    monitor_every: int = 0
    """Steps between activation norms and largest activations of every decoder layer; 0 never."""
    profile_steps: list[int] = field(default_factory=list)
    """First and last step that torch.profiler records, as a trace in the run directory; empty records none."""
    gc_every: int = 0
    """Steps between Python's garbage collections, at the same steps on all ranks; 0 leaves Python to collect when it
    likes."""
    memory_history: bool = False
    """Remember where CUDA memory was taken, for the snapshot that is written when it runs out; costs some time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationSet:
    """Rows that are only scored, the same every time."""

    sources: list[str] = field(default_factory=list)
    """Names in data.sources, those of weight 0 included (so sources can be held out); empty takes the mixture."""
    seed: int = 0
    """In place of data.seed; another one packs the sources of training anew, which holds nothing out."""
    num_rows: int = MISSING
    """Rows of the set, over all dp ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Scoring without learning, on fixed rows."""

    every: int = 0
    """Steps between validations, also at the end; 0 never."""
    sets: dict[str, ValidationSet] = field(default_factory=dict)
    """Sets by name; their losses are kept apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesConfig:
    """What the model draws and answers while it trains; needs data.image_tokenizer."""

    every: int = 0
    """Steps between samples; 0 never. Each time rank 0 reads all weights and the other ranks wait."""
    captions: list[str] = field(default_factory=list)
    """What to draw."""
    questions: dict[str, str] = field(default_factory=dict)
    """Questions by the file of the picture they are about; answered greedily."""
    guidance_scale: float = 5.0
    """Guidance of the drawings; 1 is without."""
    max_new_tokens: int = 64
    """Longest answer, tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When training state is written."""

    save_every: int = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: int = 2
    """Newest checkpoints that retention keeps."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay for good, beside the newest; 0 keeps none for good."""
    asynchronous: bool = True
    """Copy the state to host memory and write it while training goes on; the last one of a run is always waited for."""
    staging_gib: float = 0.0
    """GiB of host memory that the copy on one rank may take; what does not fit is written before training goes on. 0
    lets it take one whole share of the state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthConfig:
    """What happens when numbers go wrong or a rank stops."""

    max_skips_in_a_row: int = 5
    """Steps in a row whose update may be left out, because a loss or the gradient norm was no finite number or a spike,
    after which the run goes back to the newest checkpoint before them and leaves out the batches since."""
    max_rewinds: int = 1
    """How often a run may go back in this way; then it stops with an error."""
    spike_sigmas: float = 0.0
    """Also leave out updates whose losses or gradient norm lie this many standard deviations above the mean of the last
    good steps; 6 is usual; 0 leaves spikes alone."""
    spike_window: int = 128
    """Good steps that mean and deviation are taken over; nothing is a spike before half of them were seen."""
    hang_timeout_s: float = 600.0
    """Seconds without the end of a step, or 20 times its median if that is longer, after which the ranks that stopped
    are looked for (10 times as long before the first step, in validation and when saving); 0 switches this off."""
    hang_action: HangAction = HangAction.report
    """What follows."""
    stop_grace_s: float = 300.0
    """Seconds after a stop signal within which all ranks must have agreed to stop and saved; then the process ends
    without having saved. 0 waits for ever."""
    replicas_every: int = 0
    """Steps between comparisons of what data-parallel ranks hold in copy, to find silent corruption; 0 never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One stage of a Janus on some ranks: the root of a training configuration."""

    name: str = MISSING
    """Name of the run."""
    run_dir: str = MISSING
    """Directory that receives config, metrics, events and checkpoints."""
    seed: int = 0
    """Seed of the initialisation; the data side has its own (data.seed)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture."""
    data: DataSpec = field(default_factory=DataSpec)
    """Sources and packing."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    stage: StageConfig = field(default_factory=StageConfig)
    """What trains, how long."""
    loss: LossConfig = field(default_factory=LossConfig)
    """How losses are joined."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Metrics."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Losses on fixed rows."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Drawings and answers while it trains."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """Skipped steps, spikes, hangs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerDataConfig:
    """Pictures an image tokenizer learns from."""

    path: str = MISSING
    """Raw image-caption records: a .jsonl beside its pictures, or a directory of such (see docs/formats.md)."""
    seed: int = 0
    """Fixes the order of pictures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerRunConfig:
    """Training of an image tokenizer by the same loop: the root of `tokenizer train-image`."""

    name: str = MISSING
    """Name of the run."""
    run_dir: str = MISSING
    """Directory that receives config, metrics, events and checkpoints."""
    seed: int = 0
    """Seed of the initialisation."""
    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    """Architecture."""
    data: TokenizerDataConfig = field(default_factory=TokenizerDataConfig)
    """Pictures."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout; only dp."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    num_steps: int = MISSING
    """Optimizer steps."""
    global_batch_size: int = MISSING
    """Pictures per step over all ranks."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Metrics."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """Skipped steps, spikes, hangs."""
