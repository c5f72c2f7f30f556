"""`hope checkpoint …`: what is there, is it whole, what may go, use elsewhere and back again, what differs.

Nothing here but `consolidate`, `to-universal`, `from-universal` and `diff` needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hope_train.checkpoint.fence import unowned
from hope_train.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFEST,
    TRIMMED,
    Manifest,
    is_trimmed,
    list_checkpoints,
    list_superseded,
    list_unfinished,
    problems,
    read_manifest,
    shown_in,
    size_problem,
    step_of,
    wanted_files,
)
from hope_train.checkpoint.own_saves import OWN, stale
from hope_train.checkpoint.own_saves import remove as remove_own
from hope_train.checkpoint.retention import removals, remove, remove_unfinished, size_of
from hope_train.errors import UserError

DAMAGED, DIFFERENT = 2, 1
"""Exit codes of `verify` and `diff`."""

Entry = dict[str, Any]


def ls_command(run: str, as_json: bool) -> int:
    """List the checkpoints of a run directory: step, tokens, size, and where each level's files lie, how old they are.

    Whether a checkpoint is whole goes by the sizes of its files here; `hope checkpoint verify` reads them.

    Raises UserError when `run` is no run directory.
    """
    checkpoints = checkpoints_of(run)
    folders = (*list_checkpoints(checkpoints), *list_superseded(checkpoints))
    # A run that trains may remove one while it is looked at.
    found = [entry for folder in folders if (entry := _describe(folder)) and folder.is_dir()]
    found += [
        {"name": path.name, "kind": "unfinished", "bytes": size_of(path)} for path in list_unfinished(checkpoints)
    ]
    total = sum(entry["bytes"] for entry in found)
    if as_json:
        print(json.dumps({"checkpoints": found, "bytes": total}, ensure_ascii=False))
        return 0
    if not found:
        print(f"{checkpoints}: no checkpoints")
        return 0
    table = Table(title=str(checkpoints), title_justify="left")
    table.add_column("checkpoint", overflow="fold")
    for column in ("step", "tokens", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("whole", no_wrap=True)
    table.add_column("where its sets lie (age in steps)", overflow="fold")
    for entry in found:
        if entry["kind"] == "unfinished":
            table.add_row(entry["name"], "", "", size_text(entry["bytes"]), "no", "half written or half deleted")
            continue
        step, tokens = (f"{entry[key]:,}" if entry.get(key) is not None else "" for key in ("step", "tokens"))
        state = {"checkpoint": "yes" if entry["whole"] else "NO", "remains": "no"}[entry["kind"]]
        table.add_row(entry["name"], step, tokens, size_text(entry["bytes"]), state, _places(entry))
    Console().print(table)
    print(f"{size_text(total)} in all; sizes are those of each folder, without what it refers to in others")
    return 0


def _describe(folder: Path) -> Entry:
    """An entry of `ls` for a folder named like a checkpoint."""
    entry: Entry = {
        "name": folder.name,
        "kind": "checkpoint",
        "bytes": size_of(folder),
        "whole": False,
        "problem": None,
    }
    if is_trimmed(folder):
        sets = sorted(path.name for path in folder.glob("*") if path.is_dir())
        return {**entry, "kind": "remains", "step": step_of(folder), "held": sets}
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return {**entry, "step": step_of(folder), "problem": str(error)}
    wanted = wanted_files(folder, manifest)
    reasons = ((path, size_problem(path, record)) for path, record in wanted.items())
    entry["problem"] = next((f"{shown_in(folder, path)} {reason}" for path, reason in reasons if reason), None)
    return {
        **entry,
        "whole": entry["problem"] is None,
        "step": manifest.step,
        "tokens": manifest.tokens,
        "created": manifest.created,
        "incarnation": manifest.incarnation,
        "bytes_with_references": sum(record.bytes for record in wanted.values()) + size_of(folder / MANIFEST),
        "sets": {name: _describe_set(folder, manifest, name) for name in manifest.sets},
    }


def _describe_set(folder: Path, manifest: Manifest, name: str) -> Entry:
    part = manifest.sets[name]
    place = manifest.set_folder(folder, name)
    return {
        "folder": place.relative_to(folder.parent).as_posix(),
        "here": place.is_relative_to(folder),
        "age": manifest.step - part.step if part.step is not None else None,
        "updates": part.updates,
        "rows": part.rows,
        "bytes": sum(record.bytes for record in part.files.values()),
    }


def _places(entry: Entry) -> str:
    """`here: core, level_0, level_1_accumulator of 4 ranks; step_00000004: level_1 (2), level_2 (2)`"""
    if entry["kind"] == "remains":
        return f"held for others: {', '.join(entry['held'])}"
    if entry["problem"] is not None and "sets" not in entry:
        return str(entry["problem"])
    by_place: dict[str, list[str]] = {}
    for name, part in entry["sets"].items():
        home = "here" if part["here"] else part["folder"].partition("/")[0]
        more = f" of {part['rows']} ranks" if part["rows"] else ""
        by_place.setdefault(home, []).append(name + (more if part["here"] else f" ({part['age']})"))
    text = "; ".join(f"{home}: {', '.join(names)}" for home, names in by_place.items())
    return text if entry["problem"] is None else f"{entry['problem']} | {text}"


def verify_command(path: str, as_json: bool) -> int:
    """Compare every file of a checkpoint, or of all of a run, with its manifest, contents and all.

    Returns 0 when all are whole, 2 when one is not; each file that is wrong is named. Raises UserError when there is
    nothing to verify.
    """
    known: dict[Path, str] = {}
    results = []
    for folder in _folders(path):
        wrong, files = [], 0
        was_published = (folder / MANIFEST).is_file()
        try:
            manifest = read_manifest(folder)
            files = len(wanted_files(folder, manifest)) + 1
            wrong = list(problems(folder, manifest, known))
        except UserError as error:
            wrong.append(str(error))
        if wrong and was_published and not (folder / MANIFEST).is_file():
            continue  # no longer kept by the run that trains meanwhile, and none any more
        results.append({"name": folder.name, "whole": not wrong, "files": files, "problems": wrong})
        if not as_json:
            print(f"{folder.name}: " + (f"whole, {files} files" if not wrong else "DAMAGED"))
            print(*(f"  {line}" for line in wrong), sep="\n", end="\n" if wrong else "")
    damaged = sum(not result["whole"] for result in results)
    if as_json:
        print(json.dumps({"checkpoints": results, "damaged": damaged}, ensure_ascii=False))
    return DAMAGED if damaged else 0


def prune_command(
    run: str,
    keep_last: int | None,
    keep_every: int | None,
    superseded: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Remove from a run directory what no checkpoint that is kept names.

    Args:
        keep_last: how many of the newest checkpoints to keep, not counting those of which a file is missing or has
            another size; None: all of them.
        keep_every: also keep each whose step is a multiple of it; None: as the newest one's configuration says.
        superseded: remove those that were set aside too.
        dry_run: say what would go, and leave it.
        force: although the run belongs to a process on another machine.

    Raises:
        UserError: no run directory, a process is training in it, or something cannot be deleted.
    """
    checkpoints = checkpoints_of(run)
    try:
        with unowned(checkpoints.parent, force):
            every = keep_every if keep_every is not None else _configured_keep_every(checkpoints)
            found = removals(checkpoints, keep_last, every, superseded, check_sizes=True)
            unfinished = {folder: size_of(folder) for folder in list_unfinished(checkpoints)}
            rows: list[Entry] = [
                {"name": item.folder.name, "keeps": list(item.keep), "bytes": item.bytes} for item in found
            ]
            rows += [{"name": folder.name, "keeps": [], "bytes": size} for folder, size in unfinished.items()]
            own = stale(checkpoints.parent, {item.folder.name for item in found})
            own += list_unfinished(checkpoints.parent / OWN)
            rows += [{"name": f"{OWN}/{folder.name}", "keeps": [], "bytes": size_of(folder)} for folder in own]
            if not dry_run:
                remove(found, mark="by-hand")
                list(remove_unfinished(checkpoints))
                remove_own(checkpoints.parent / OWN, own)
    except OSError as error:
        raise UserError(f"{checkpoints} cannot be pruned: {error.strerror or error}") from None
    freed = sum(row["bytes"] for row in rows)
    if as_json:
        print(json.dumps({"removed": rows, "bytes": freed, "dry_run": dry_run}, ensure_ascii=False))
        return 0
    done = "would be removed" if dry_run else "removed"
    for row in rows:
        rest = f", but for {', '.join(row['keeps'])}, which others refer to" if row["keeps"] else ""
        print(f"{row['name']}: {done}{rest} ({size_text(row['bytes'])})")
    print(f"{size_text(freed)} {'would be freed' if dry_run else 'freed'}" if rows else "nothing to remove")
    return 0


def _configured_keep_every(checkpoints: Path) -> int:
    """What the run itself keeps besides its newest checkpoints."""
    for folder in reversed(list_checkpoints(checkpoints)):
        try:
            settings = read_manifest(folder).config.get("checkpoint") or {}
        except UserError:
            continue
        return int(settings.get("keep_every") or 0)
    return 0


def consolidate_command(path: str, out: str, overwrite: bool, as_json: bool) -> int:
    """Write the weights of a checkpoint (or of a run's newest whole one) into one safetensors file.

    Raises UserError: no such checkpoint, damaged, or `out` cannot be written.
    """
    from hope_train.checkpoint.export import consolidate
    from hope_train.checkpoint.store import find_checkpoint

    folder, manifest = find_checkpoint(path)
    written = consolidate(folder, manifest, Path(out).expanduser(), overwrite)
    if as_json:
        print(json.dumps(written, ensure_ascii=False))
    else:
        print(
            f"{written['file']}: {written['tensors']} tensors, {written['parameters']:,} parameters, "
            f"{size_text(written['bytes'])}, of {folder} (step {manifest.step:,})"
        )
    return 0


def to_universal_command(path: str, out: str, as_json: bool) -> int:
    """Write a checkpoint (or a run's newest whole one) into a new folder in DeepSpeed's universal format.

    Raises UserError: no such checkpoint, damaged, not of AdamW; or `out` is there already or cannot be written.
    """
    from hope_train.checkpoint.store import find_checkpoint
    from hope_train.checkpoint.universal.export import to_universal

    folder, manifest = find_checkpoint(path)
    written = to_universal(folder, manifest, Path(out).expanduser())
    if as_json:
        print(json.dumps(written, ensure_ascii=False))
        return 0
    beside = f"beside them {written['beside']} entries that the format has no place for"
    print(
        f"{out}: {written['parameters']} parameters with their moments, {beside}, {size_text(written['bytes'])}, "
        f"of {folder} (step {manifest.step:,})"
    )
    return 0


def from_universal_command(path: str, out: str, like: str | None, as_json: bool) -> int:
    """Make a checkpoint of what lies in DeepSpeed's universal format, and say what has been taken from where.

    Raises UserError: no such folder, of another model; or `out` is there already or cannot be written.
    """
    from hope_train.checkpoint.store import find_checkpoint
    from hope_train.checkpoint.universal.load import from_universal

    origin = None if like is None else find_checkpoint(like)
    made = from_universal(Path(path).expanduser(), Path(out).expanduser(), origin)
    if as_json:
        print(json.dumps(made, ensure_ascii=False))
        return 0
    print(
        f"{out}: {made['parameters']} parameters with their moments, step {made['step']:,}, {made['tokens']:,} tokens"
    )
    if made["exact"]:
        print(f"nothing has changed since {path} was written: all of it is as it was, to the bit")
        return 0
    if made["counted"]:
        print(f"from {path}: weights, moments, step, tokens and the counters of the levels, which a run has left there")
    else:
        print(f"from {path}: weights, moments and how many updates each has taken, of which step and tokens are made")
    print(f"from {made['like']}: configuration, tokenizer, the order of the data, random generators")
    refused = "" if made["counted"] else "refused steps, "
    print(f"anew: what slow levels collect of a period, {refused}best and last losses")
    if made["stream"]:
        print(f"warning: data.mode is streaming, and goes on where {made['like']} was in its data")
    return 0


def diff_command(one: str, other: str, weights_only: bool, as_json: bool) -> int:
    """Show in which tensors and counters two checkpoints differ. Returns 0 when they are the same, 1 when they differ.

    Raises UserError: no such checkpoint, or damaged.
    """
    from hope_train.checkpoint.compare import compare
    from hope_train.checkpoint.store import find_checkpoint

    left, right = find_checkpoint(one), find_checkpoint(other)
    found = compare(left, right, weights_only)
    code = 0 if found.same else DIFFERENT
    if as_json:
        tensors = [
            {**vars(each), "max_abs": _finite(each.max_abs), "max_rel": _finite(each.max_rel)} for each in found.tensors
        ]
        print(json.dumps({**vars(found), "same": found.same, "tensors": tensors}, ensure_ascii=False))
        return code
    if found.tensors:
        table = Table(title=f"{left[0]} and {right[0]}", title_justify="left")
        table.add_column("tensor", overflow="fold")
        for column in ("elements that differ", "max abs", "max rel"):
            table.add_column(column, justify="right", no_wrap=True)
        for each in sorted(found.tensors, key=lambda each: -each.max_abs):
            if each.kind == "values":
                table.add_row(each.name, f"{each.different:,}", f"{each.max_abs:.3g}", f"{each.max_rel:.3g}")
            else:
                table.add_row(each.name, f"{each.one} / {each.other}", "", "")
        Console().print(table)
    for where, names in ((one, found.only_in_one), (other, found.only_in_other)):
        for name in names:
            print(f"only in {where}: {name}")
    for name, (mine, theirs) in found.counters.items():
        print(f"{name}: {_number(mine)} -> {_number(theirs)}")
    print(
        f"{found.equal} tensors are equal, {len(found.tensors)} differ, "
        f"{len(found.only_in_one) + len(found.only_in_other)} are in one alone"
    )
    return code


def checkpoints_of(run: str) -> Path:
    """The folder of checkpoints of a run directory (or that folder itself). Raises UserError."""
    place = Path(run).expanduser()
    if not place.is_dir():
        raise UserError(f"{run} is no run directory: no such folder")
    if place.resolve().name == CHECKPOINTS:
        # Of `.` or a link the parent is not the run directory, with its lock and the name of its owner.
        return place if place.name == CHECKPOINTS else place.resolve()
    if not (place / CHECKPOINTS).is_dir():
        one = (place / MANIFEST).is_file() or (place / TRIMMED).is_file()
        hint = f": that is one checkpoint; name the run directory ({place.resolve().parent.parent})" if one else ""
        raise UserError(f"{run} is no run directory (it has no folder {CHECKPOINTS}){hint}")
    return place / CHECKPOINTS


def _folders(path: str) -> Iterator[Path]:
    """The checkpoint that `path` is, or all of a run directory's."""
    place = Path(path).expanduser()
    if place.is_dir() and ((place / MANIFEST).is_file() or step_of(place.resolve()) is not None):
        yield place
        return
    checkpoints = checkpoints_of(path)
    found = [
        folder for folder in (*list_checkpoints(checkpoints), *list_superseded(checkpoints)) if not is_trimmed(folder)
    ]
    if not found:
        raise UserError(f"{checkpoints} has no checkpoints")
    yield from found


def size_text(count: int) -> str:
    """`1.5 MiB`"""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return None if value == float("inf") else value


def _number(value: int | None) -> str:
    return "none" if value is None else f"{value:,}"
