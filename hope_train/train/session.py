"""Everything a run needs, opened and checked before any work starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_pipelines.batches import DataBundle, open_data, open_tokenizer
from hope_train.checkpoint.collected import Apart
from hope_train.checkpoint.fence import FencedError, refuse_if_in_use
from hope_train.checkpoint.manifest import CHECKPOINTS, Manifest, list_checkpoints
from hope_train.checkpoint.own_saves import OWN, OwnSaves
from hope_train.checkpoint.spread import live_state, run_state
from hope_train.checkpoint.store import find_checkpoint, load_state, newest_whole, read_trainer
from hope_train.checkpoint.writer import CheckpointWriter
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError
from hope_train.evaluate.loop import Evaluator
from hope_train.levels.optimizer import LevelOptimizer
from hope_train.machine import memory_bytes
from hope_train.model.hope import HopeModel
from hope_train.parallel.engine import Engine
from hope_train.parallel.engines import build_engine
from hope_train.parallel.mesh import Mesh
from hope_train.parallel.stages import names_elsewhere
from hope_train.plan.parameters import parameter_count
from hope_train.train import randomness, rundir
from hope_train.train.display import Display
from hope_train.train.loggers import Loggers, check_loggers
from hope_train.train.metrics import JsonLines, NoLines, Stopwatch
from hope_train.train.signals import StopRequest


@dataclass
class Progress:
    """How far a run is; all of it is in every checkpoint."""

    step: int = 0
    """Global batches consumed, whether their step was applied or not; the next batch has this number."""

    tokens: int = 0
    """Training tokens consumed."""

    refused: int = 0
    """Steps in a row, up to now, that were not applied."""

    losses: dict[str, Any] = field(default_factory=dict)
    """`train` (the last step's), and by figure of evaluation its last and best values."""


@dataclass
class Session:
    """An open run."""

    config: RunConfig
    run_dir: Path
    data: DataBundle
    engine: Engine
    evaluator: Evaluator
    progress: Progress
    writer: CheckpointWriter
    metrics: JsonLines
    evaluations: JsonLines
    loggers: Loggers
    display: Display
    clock: Stopwatch
    own_saves: OwnSaves | None = None
    """Where DeepSpeed saves too, if it does. Rank 0 alone uses it."""

    lost: FencedError | None = None
    """With several processes: this one has noticed that the run is another's, and the others do not know yet."""

    @property
    def model(self) -> HopeModel:
        """The model, or this rank's part of it."""
        return self.engine.model

    @property
    def optimizer(self) -> LevelOptimizer:
        """Of `model`."""
        return self.engine.optimizer

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.engine.mesh.device

    @property
    def leads(self) -> bool:
        """Whether this process speaks and writes for the run."""
        return self.engine.mesh.team.leads

    @contextmanager
    def losing(self) -> Iterator[None]:
        """A block that may find that the run is another's. One process stops at once; of several, one that stopped
        alone would leave the others waiting, so it is kept for `still_ours`.
        """
        try:
            yield
        except FencedError as error:
            if self.engine.mesh.team.ranks == 1:
                raise
            self.lost = error

    def still_ours(self) -> None:
        """Raises FencedError on every rank if one of them has lost the run."""
        if self.engine.mesh.team.largest([int(self.lost is not None)])[0]:
            raise self.lost or FencedError("another process has taken the run over: this one stops")

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.train.total_steps

    def close(self) -> None:
        """Close the logs. Lines that could not be written to the last are lost, and that is said."""
        self.data.train.close()
        self.loggers.close()
        self.display.stop()
        for file in (self.metrics, self.evaluations):
            try:
                file.close()
            except OSError as error:
                self.display.say(f"warning: {file.path.name}: the last lines are lost: {error.strerror}")
        if self.leads:
            self.writer.fence.release()
        self.engine.close()


def is_complete(config: RunConfig, run_dir: Path, newest: Manifest | None) -> bool:
    """Whether this run has been trained, saved and evaluated to its end already.

    newest: its newest whole checkpoint. A run whose checkpoints were all taken away is still complete; one whose last
    is damaged is not.
    """
    stopped, total = rundir.read_stopped(run_dir), config.train.total_steps
    marked = stopped.get("reason") == "completed" and stopped.get("step", 0) >= total
    return marked and (newest is None or newest.step >= total)


def open_session(
    config: RunConfig, resume: str, force: bool, display: Display, mesh: Mesh, stop: StopRequest
) -> Session | None:
    """Check everything, build model and optimizer, load the checkpoint to go on from, and take the directory over.

    Nothing is written (but the cache of tokenised text) before all checks have passed. Every rank of the mesh calls
    it; the first one looks at the run directory, and a mistake is every rank's end.

    Args:
        resume: `auto`, `never`, or the checkpoint to go on from.
        force: go on although the directory, or the checkpoint, is of another configuration.
        stop: is told when the directory is about to be taken over.

    Returns:
        The open run; None if it is complete and there is nothing to do.

    Raises:
        UserError: whatever is wrong with the input.
    """
    run_dir, team = Path(config.run_dir).expanduser(), mesh.team

    def check_place() -> None:
        rundir.check_directory(run_dir)
        refuse_if_in_use(run_dir)
        check_loggers(config)

    def look() -> tuple[list[str], bool, tuple[Path, Manifest] | None]:
        """(what to say at the start, whether the run is complete, the checkpoint to go on from)."""
        changed = rundir.check_owner(run_dir, config, tokenizer, force)
        notes = [f"configuration changed since the last start: {', '.join(changed)}"] if changed else []
        found = choose_checkpoint(run_dir, resume, display.say)
        if found is not None:
            check_same_run(*found, config, tokenizer.fingerprint, force)
        if resume == "auto" and is_complete(config, run_dir, found[1] if found is not None else None):
            return notes, True, None
        if found is not None and resume != "auto":
            notes += other_settings(found[1], config)
        return notes, False, found

    team.on_first(check_place)
    tokenizer = team.together(lambda: open_tokenizer(config.data, config.model.vocab_size))
    notes, complete, found = team.on_first(look)
    if complete:
        return None
    notes += [tokenizer.note] if tokenizer.note is not None else []
    prepare_torch(config)
    evaluator = team.together(lambda: Evaluator(config, tokenizer, mesh.device))
    data = team.together(lambda: open_data(config.data, config.train, config.seed, config.model.vocab_size))
    if found is not None:
        notes += check_same_data(*found, data_identity(config, data), force)

    randomness.seed_everything(config.seed)
    engine = team.together(lambda: build(config, mesh))
    evaluator.shares = engine.shares()
    progress = Progress() if found is None else load_progress(*found, engine)
    if found is not None:
        data.train.restore(read_trainer(found[0]).get("data", {}))
    apply_options(config, engine.model)

    stop.opened()
    fence = team.on_first(lambda: rundir.open_directory(run_dir, config, tokenizer, progress.step))
    keep = config.checkpoint
    writer = CheckpointWriter(fence, keep.keep_last, keep.keep_every, keep.async_save, display.say, keep.levels)
    team.on_first(writer.remove_unfinished)
    team.on_first(lambda: writer.set_aside(after=progress.step))
    if found is not None:
        writer.go_on_from(*found)
    own = None
    if config.parallel.engine == "deepspeed" and config.parallel.deepspeed.own_saves:
        own = OwnSaves(fence)
    elif keep.async_save:
        writer.reserve(run_state(engine))
    if own is not None or (run_dir / OWN).is_dir():
        team.on_first(lambda: OwnSaves(fence).open(after=progress.step))
    for line in (*notes, *(f"warning: {line}" for line in engine.optimizer.plan.warnings())):
        display.say(line)
    if found is not None:
        display.say(f"going on from {found[0]} (step {progress.step}, {progress.tokens:,} tokens)")
    lines = JsonLines if team.leads else NoLines
    return Session(
        config=config,
        run_dir=run_dir,
        data=data,
        engine=engine,
        evaluator=evaluator,
        progress=progress,
        writer=writer,
        metrics=lines(run_dir / rundir.METRICS),
        evaluations=lines(run_dir / rundir.EVALUATIONS),
        loggers=Loggers(config, run_dir, progress.step, display.say, silent=not team.leads),
        display=display,
        clock=Stopwatch(),
        own_saves=own,
    )


def choose_checkpoint(run_dir: Path, resume: str, tell: Any) -> tuple[Path, Manifest] | None:
    """The checkpoint to go on from, verified; None: start from the beginning. Raises UserError."""
    there = list_checkpoints(run_dir / CHECKPOINTS)
    if resume == "never":
        if there:
            raise UserError(
                f"run directory {run_dir} has checkpoints already (the newest is {there[-1].name}): choose another "
                "name= or dir=, or leave --resume at auto to go on from there"
            )
        return None
    if resume != "auto":
        return find_checkpoint(resume, tell)
    found = newest_whole(run_dir, tell)
    if found is None and there:
        raise UserError(
            f"run directory {run_dir} has checkpoints, but none of them is whole: move {run_dir / CHECKPOINTS} away to "
            "start from the beginning, or choose another name= or dir="
        )
    return found


def check_same_run(folder: Path, manifest: Manifest, config: RunConfig, tokenizer: str, force: bool) -> None:
    """Refuse a checkpoint from beyond the run's end, of another model or of another tokenizer.

    With `force` only the shapes, later, have to fit.
    """
    if manifest.step > config.train.total_steps:
        raise UserError(
            f"checkpoint {folder} is of step {manifest.step}, and this run ends at {config.train.total_steps}: raise "
            f"train.tokens (now {config.train.tokens}, the checkpoint has seen {manifest.tokens})"
        )
    if force:
        return
    keys = rundir.differences(manifest.config.get("model"), config.model.model_dump(mode="json"), "model.")
    if keys:
        others = ", ".join(list(keys)[:3])
        raise UserError(
            f"checkpoint {folder} is of another model: not as in this configuration is {others}; use that "
            "model, or say --force-config to load it all the same"
        )
    if manifest.tokenizer != tokenizer:
        raise UserError(
            f"checkpoint {folder} was trained with another tokenizer ({manifest.tokenizer[:12]}, this one is "
            f"{tokenizer[:12]}): set data.tokenizer to that one"
        )


def other_settings(manifest: Manifest, config: RunConfig) -> list[str]:
    """In one line, if any, which keys a checkpoint was trained with otherwise, as far as they matter to the result."""
    keys = rundir.serious(rundir.differences_from_tree(manifest.config, config))
    shown = [f"{key} {rundir.short(was)} -> {rundir.short(now)}" for key, (was, now) in list(keys.items())[:8]]
    more = f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else ""
    return [f"configuration differs from the checkpoint's: {', '.join(shown)}{more}"] if keys else []


def check_same_data(folder: Path, manifest: Manifest, identity: dict[str, Any], force: bool) -> list[str]:
    """Refuse to go on with batches that are not those the run began with; with `force`, say it in a line."""
    keys = rundir.differences(manifest.data, identity)
    if keys and force:
        return [f"data differs from the checkpoint's: {', '.join(keys)}; samples may be lost or seen twice"]
    if keys:
        raise UserError(
            f"checkpoint {folder} was trained on other data ({', '.join(keys)} differ): samples would be lost or seen "
            "twice; restore the text, or say --force-config to go on with the new one"
        )
    return []


def build(config: RunConfig, mesh: Mesh) -> Engine:
    """`build_engine`, for sizes a machine can hold. Raises UserError that names what is needed otherwise."""
    count, there = parameter_count(config.model) // (mesh.sizes.world // mesh.sizes.dp_replicate), memory_bytes()
    # fp32 weights are made in main memory; a run on the CPU adds gradients and two moments of the same size.
    each, what = (16, "weights, gradients and moments") if mesh.device.type == "cpu" else (4, "weights")
    need = f"the model has {count:,} parameters, whose {what} need {each * count / 2**30:,.1f} GiB"
    smaller = "make the model smaller (`hope plan` shows what its parts need)"
    if each * count > there:
        raise UserError(f"{need}, and this machine has {there / 2**30:,.1f}: {smaller}")
    try:
        return build_engine(config, mesh)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(f"{need}, more than is free here: {smaller}") from None


def data_identity(config: RunConfig, data: DataBundle) -> dict[str, Any]:
    """All that global batch i depends on: the text, how it is cut, and the seed of its order."""
    return {
        "text": data.description["corpus"]["content"],
        "validation_fraction": config.data.validation_fraction,
        "windows": data.train.windows,
        "context_length": data.train.context_length,
        "batch_sequences": data.train.sizes.sizes[-1],
        "reset_at_documents": data.train.reset_at_documents,
        "seed": config.seed,
        **({"batch_ramp": ramp.model_dump()} if (ramp := config.train.batch_ramp).start_tokens is not None else {}),
        **data.identity,
    }


def load_progress(folder: Path, manifest: Manifest, engine: Engine) -> Progress:
    """Put a verified checkpoint of any layout into model, optimizer and random generators.

    Raises UserError for another model.
    """
    optimizer = engine.optimizer
    state, elsewhere = live_state(engine), names_elsewhere(engine.model)
    load_state(
        folder, manifest, engine.wrap(state), engine.mesh.team.group, Apart(state, engine.rows()), elsewhere=elsewhere
    )
    optimizer.load_named_state(
        {
            name: {key: tensor for key, tensor in part.items() if key.startswith("optimizer.")}
            for name, part in state.items()
        }
    )
    if manifest.stacked is None:
        optimizer.unfold()
    engine.loaded()
    trainer = read_trainer(folder)
    randomness.restore(trainer["random"])
    return Progress(manifest.step, manifest.tokens, int(trainer["refused"]), dict(manifest.losses))


def prepare_torch(config: RunConfig) -> None:
    """Threads and determinism, before anything is computed."""
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    if config.train.deterministic:
        randomness.make_deterministic()


def apply_options(config: RunConfig, model: HopeModel) -> None:
    """Recompute and compile as configured. Raises UserError where the model has nothing of the kind."""
    model.recompute = config.train.recompute
    if config.train.compile == "model":
        model.compile_blocks(config.train.compile_budget)
    elif config.train.compile == "memory":
        if config.model.arch != "hope":
            raise UserError(f"train.compile=memory: arch={config.model.arch} has no memory; say model or none")
        model.compile_memory(config.train.compile_budget)
