"""`finetune`: trains the tables of a codebook so that the model over quantized keys gives its own logits again."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..codebook import AnTKVCodebook, describe_model
from ..config import AnTKVConfig
from ..texts import TextMix, mix_windows
from .checks import check_model, weights_digest
from .finetune_state import TrainingState
from .intercept import frozen_for_statistics
from .sensitivity import without_outdated
from .straight_through import NAME, Student
from .work_folder import digest

HELD_OUT = 8  # windows that are never trained on: the loss before and after
SAVE_EVERY = 10  # steps
_LOGITS = 1 << 26  # compared at a time: 256 MB in float32
_LEAST_LOSS = 1e-6  # nats: below it tables are as good as exact, and a loss relative to it means nothing


@dataclass(frozen=True)
class Numbers:
    """The numbers of a run, with their defaults; raises ValueError naming the first that cannot be."""

    steps: int = 150
    batch: int = 8
    window: int = 1024
    windowed: float = 0.75
    learning_rate: float = 5e-3
    seed: int = 0
    tokens: int = 262144
    micro_batch: int = 8

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "window", "tokens", "seed"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number")
        for name in ("steps", "batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.windowed <= 1:
            raise ValueError(f"windowed={self.windowed} must lie between 0 and 1: it is a share of the steps")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate={self.learning_rate} must lie between 0 and 1, e.g. 0.005")

    def deciding(self) -> dict[str, Any]:
        """Those that decide the tables; `micro_batch` does by rounding only."""
        return {name: number for name, number in asdict(self).items() if name != "micro_batch"}

    def check_text(self, config: AnTKVConfig, name: str = "window") -> None:
        """Raises ValueError if windows of text leave nothing to train on beside the exact tokens (last keys and sinks),
        or are few; `name` is what they are set by."""
        exact = config.window + config.anchors.sinks
        least = exact + 1 if self.windowed else 2
        if self.window < least:
            raise ValueError(
                f"{name}={self.window} must be at least {least}: {exact} tokens stay exact, the last keys of a query "
                "and the sinks, and only the others train the tables"
            )
        if self.tokens // self.window < (needed := self.batch + HELD_OUT):
            raise ValueError(
                f"tokens={self.tokens} are {self.tokens // self.window} windows of {self.window}, but a batch of "
                f"{self.batch} and {HELD_OUT} held-out windows need {needed}: raise tokens to {needed * self.window}, "
                f"take a smaller batch, or lower {name}"
            )

    def is_windowed(self, step: int) -> bool:
        """Whether the recent window is exact in a step; such steps are spread evenly."""
        return math.floor((step + 1) * self.windowed) > math.floor(step * self.windowed)

    def order(self, count: int) -> torch.Tensor:
        """Windows of each step ``(steps, batch)``: all `count` in random order, then again in another."""
        needed = self.steps * self.batch
        generator = torch.Generator().manual_seed(self.seed)
        rounds = [torch.randperm(count, generator=generator) for _ in range(-(-needed // count))]
        return torch.cat(rounds)[:needed].view(self.steps, self.batch)

    def rate(self, step: int) -> float:
        """Cosine from the learning rate to 0."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def finetune(
    model: PreTrainedModel,
    tokenizer,
    texts: TextMix | Sequence[str],
    codebook: AnTKVCodebook,
    *,
    steps: int = Numbers.steps,
    batch: int = Numbers.batch,
    window: int = Numbers.window,
    windowed: float = Numbers.windowed,
    learning_rate: float = Numbers.learning_rate,
    seed: int = Numbers.seed,
    tokens: int = Numbers.tokens,
    micro_batch: int = Numbers.micro_batch,
    work_dir: str | Path | None = None,
    progress: bool = True,
    sources: Sequence[str] | None = None,
) -> AnTKVCodebook:
    """Trains a codebook's centroids by distillation: least KL(logits of the model || logits over quantized keys).

    Every step runs the model as it is and with keys and values coded by the tables as they stand, sinks and anchors
    exact, errors running from layer to layer (see `straight_through`); Adam with a cosine moves the centroids, and the
    size of the noise of every sub-vector of keys, where it was measured (`reference.code_bias`). Some
    steps see text as in use, with the codebook's recent window exact (protocol S<n>), the others with every token coded
    (W0): tables tuned for W0 alone lose at long contexts. Each protocol's loss counts relative to what it was before.
    Means, bases and metrics stay; layers that a cache leaves exact stay exact.

    Peak memory beside the weights: the activations of `micro_batch` windows (their whole graph; about 90 bytes for each
    token, layer and hidden channel in float32, measured on SmolLM2) + 3 * micro_batch * window * vocabulary elements of
    logits + 16 bytes for each element of the centroids. SmolLM2 in float32: about 2 MB a token.

    Args:
        model: the codebook's model, on the device and in the dtype to compute in; float32 matrix products of a GPU run
            in TF32. It is left as it was.
        tokenizer, texts: as for `calibrate`.
        codebook: tables to start from; it is not changed.
        steps, batch: steps of Adam, and windows of text in each.
        window: tokens of a window of text, more than the codebook's exact window.
        windowed: share of the steps in which the recent window is exact, spread evenly.
        learning_rate: of the first step, as a share of the root mean square of a table's centroids at 1 bit an element;
            finer tables take steps as much smaller as their centroids lie closer, coarser ones larger.
        seed: decides text and order. The same seed gives the same tables on a CPU with the same number of threads; on
            a GPU the backward pass of attention adds in an order that changes, so they agree to rounding only.
        tokens: of text to draw from, used again once all is seen; 8 windows of it are held out to measure the loss.
        micro_batch: windows of a batch that run together; fewer take less memory and more time.
        work_dir: where the run is saved every 10 steps. One that was stopped goes on from there, with the result of an
            uninterrupted one. None: nothing is saved.
        progress: show a progress bar with the last loss under each protocol.
        sources: what the card says about the texts, instead of their names.

    Returns:
        A codebook of the same specs and shapes, without measured rows. ``calibration["finetune"]`` holds the numbers
        of the run and, by protocol, the held-out loss (nats a token) before and after.

    Raises:
        ValueError: before any work: numbers that cannot be, too little text, a codebook of another model, or none.

    Example:
        >>> tuned = finetune(model, tokenizer, TextMix.from_sources(["wiki.txt=0.5", "code/=0.5"]), codebook)
        >>> tuned.save_pretrained("codebooks/my-model-1bit-tuned")
    """
    run = Numbers(steps, batch, window, windowed, learning_rate, seed, tokens, micro_batch)
    if not isinstance(codebook, AnTKVCodebook):
        raise ValueError(
            f"there are no tables to train in a {type(codebook).__name__}: give an AnTKVCodebook, as calibrate makes; "
            "scalar and identity codecs have none"
        )
    mix = TextMix.of(texts)
    check_model(model)
    student = Student(model, codebook)
    exact = student.config.window
    run.check_text(student.config)
    pool = mix_windows(tokenizer, mix, window, tokens // window, seed)
    held, pool = pool[:HELD_OUT], pool[HELD_OUT:]
    place = None
    if work_dir is not None:
        place = Path(work_dir) / f"finetune-{digest(_settings(model, codebook, run, pool))}.safetensors"
    with frozen_for_statistics(model, NAME), _fast_products(model):
        student.prepare(model, held[:1, : exact + 1])
        state = TrainingState(student.parameters(), place)
        if not state.facts:
            state.facts = {"before": _losses(model, student, held, run)}
        _train(model, student, pool, run, state, progress)
        tuned = AnTKVCodebook(codebook.config, student.tables(), codebook.model)
        after = _losses(model, Student(model, tuned), held, run)
    for name, loss in after.items():
        if loss > (start := state.facts["before"][name]):
            warnings.warn(
                f"fine-tuning raised the held-out loss of {name} from {start} to {loss} nats a token: judge by `antkv "
                "evaluate` whether to keep the codebook from before, or take fewer steps or more text",
                stacklevel=2,
            )
    facts = run.deciding() | {
        "dtype": str(model.dtype).removeprefix("torch."),
        "sources": list(sources) if sources is not None else mix.describe(),
        "loss": {name: [state.facts["before"][name], after[name]] for name in after},
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    made = {**without_outdated(codebook.calibration), "finetune": facts}
    return AnTKVCodebook(codebook.config, tuned.tables, codebook.model, made)


def _settings(model: PreTrainedModel, codebook: AnTKVCodebook, run: Numbers, pool: torch.Tensor) -> dict[str, Any]:
    """All that decides the tables."""
    described = describe_model(model.config.get_text_config(decoder=True))
    return {
        "format": 3,
        "model": digest({k: v for k, v in described.items() if k != "base_model"}),
        "weights": weights_digest(model),
        "dtype": str(model.dtype),
        "codebook": codebook.sha256,
        "config": codebook.config.to_dict(),
        "text": hashlib.sha256(pool.numpy().tobytes()).hexdigest()[:16],
        **run.deciding(),
    }


def _train(
    model: PreTrainedModel, student: Student, pool: torch.Tensor, run: Numbers, state: TrainingState, progress: bool
) -> None:
    """The steps that are still to do."""
    order, names = run.order(len(pool)), _protocols(student)
    seen: dict[str, str] = {}
    with tqdm(total=run.steps, initial=state.step, desc="finetune", unit="step", disable=not progress) as bar:
        while state.step < run.steps:
            name = list(names)[run.is_windowed(state.step)]
            weight = 1 / max(state.facts["before"][name], _LEAST_LOSS)
            loss = _distill(model, student, pool[order[state.step]], names[name], run.micro_batch, weight)
            if not math.isfinite(loss):
                raise ValueError(
                    f"step {state.step}: the loss is {loss} in {model.dtype}: load the model in bfloat16 or float32, "
                    f"or lower learning_rate={run.learning_rate}"
                )
            state.update(run.rate(state.step))
            if state.step % SAVE_EVERY == 0 or state.step == run.steps:
                state.save()
            seen[name] = f"{loss:.4f}"
            bar.update()
            bar.set_postfix(seen)


def _protocols(student: Student) -> dict[str, int]:
    """Exact window of the two protocols by name; W0 first."""
    return {"W0": 0, f"S{student.config.window}": student.config.window}


def _losses(model: PreTrainedModel, student: Student, held: torch.Tensor, run: Numbers) -> dict[str, float]:
    """Held-out loss by protocol, nats a token."""
    names = _protocols(student)
    return {name: round(_distill(model, student, held, names[name], run.micro_batch), 5) for name in names}


def _distill(
    model: PreTrainedModel, student: Student, ids: torch.Tensor, exact: int, micro_batch: int, weight: float = 0.0
) -> float:
    """Mean KL a token of windows `ids` ``(batch, n)``; `weight` times its gradient, summed, is added to the tables'."""
    total = 0.0
    for part in ids.to(model.device).split(micro_batch):
        with torch.no_grad():
            target = model(input_ids=part, use_cache=False).logits
        with student.active(exact), torch.set_grad_enabled(weight != 0):
            logits = model(input_ids=part, use_cache=False).logits
            loss, gradient = kl_gradient(logits.detach(), target, weight)
            del target
            if gradient is not None:
                logits.backward(gradient)
        total += float(loss) * len(part)
    return total / len(ids)


def kl_gradient(
    logits: torch.Tensor, target: torch.Tensor, weight: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """KL(softmax(target) || softmax(logits)) and its gradient by `logits`, their difference; in blocks of rows.

    Args:
        logits, target: ``(batch, n, vocabulary)``. weight: factor on the gradient; 0 leaves it out.

    Returns:
        mean over all tokens (a scalar); the gradient of their sum, like `logits`.
    """
    gradient = torch.empty_like(logits) if weight else None
    total = torch.zeros((), device=logits.device)
    step = max(1, _LOGITS // (logits.shape[0] * logits.shape[2]))
    for start in range(0, logits.shape[1], step):
        rows = slice(start, start + step)
        student, teacher = (x[:, rows].float().log_softmax(-1) for x in (logits, target))
        probs = teacher.exp()
        total += (probs * (teacher - student)).sum()
        if gradient is not None:
            gradient[:, rows] = student.exp_().sub_(probs).mul_(weight)
    return total / logits.shape[:2].numel(), gradient


@contextmanager
def _fast_products(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a GPU multiplies float32 matrices in TF32."""
    before = torch.get_float32_matmul_precision()
    if model.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
