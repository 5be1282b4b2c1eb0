"""Damage to checkpoints: every one must be found, named, set aside, and the run continued from the one before.

A training of each kind leaves a folder with several checkpoints. A trial damages one file of the newest: one flipped
bit, a file cut short, a page set to zero, a file removed, a folder emptied; the file is drawn evenly from all files of
the checkpoint that a resume reads, so that small ones count as much as large ones. Then the run folder is opened and
restored as a resume does it. Found: the newest is named damaged. Recovered: the next older one is restored, with every
array's bytes, and the damaged one is set aside, not deleted. One trial in WHOLE_EVERY is a whole resume by command, to
the run's end, and compared with the uninterrupted run. At the end all checkpoints of a folder are damaged: an error,
and nothing moved.
"""

import collections
import random
import shutil

import jax
import numpy as np

from altgrad_jax.errors import UserError
from altgrad_jax.run import checkpoint
from campaigns.runs import Part, command, differences, fingerprint, finish, reference, table

WAYS = ("flipped bit", "truncated file", "zeroed page", "missing file", "emptied folder")
PAGE = 4096
WHOLE_EVERY = 20
NOT_READ = ("_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax's notes, written after the seal


def damage(path, way, rng):
    """Damages the checkpoint folder `path` in this way; what was done, in words. The bytes surely change."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name not in NOT_READ)
    if way == "emptied folder":
        folders = sorted({file.parent for file in files} | {path})
        folder = rng.choice(folders)
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return f"{folder.relative_to(path)}/ emptied"
    if way == "zeroed page":  # of a file that has one which is not zero already
        files = [file for file in files if _pages(file)]
    file = rng.choice([file for file in files if file.stat().st_size or way == "missing file"])
    name, content = file.relative_to(path), bytearray(file.read_bytes())
    if way == "missing file":
        file.unlink()
        return f"{name} removed"
    if way == "truncated file":
        left = rng.randrange(len(content))
        file.write_bytes(content[:left])
        return f"{name} cut from {len(content)} to {left} bytes"
    if way == "zeroed page":
        page = rng.choice(_pages(file))
        size = len(content[page * PAGE : (page + 1) * PAGE])
        content[page * PAGE : (page + 1) * PAGE] = bytes(size)
        words = f"page {page} of {name} zeroed"
    else:
        at, bit = rng.randrange(len(content)), rng.randrange(8)
        content[at] ^= 1 << bit
        words = f"bit {bit} of byte {at} of {name} flipped"
    file.write_bytes(content)
    return words


def _pages(file):
    """Numbers of the pages of a file that are not all zero."""
    content = file.read_bytes()
    return [i for i in range(-(-len(content) // PAGE)) if any(content[i * PAGE : (i + 1) * PAGE])]


def _abstract(document):
    """The state's shapes as they stand in a checkpoint."""
    return checkpoint._nest(
        {
            name: jax.ShapeDtypeStruct(tuple(array["shape"]), jax.numpy.dtype(array["dtype"]))
            for name, array in document["arrays"].items()
        }
    )


def _restore(run_dir, abstract):
    """((step, state) or the error's text, [(damaged step, reason)]) of a resume."""
    checkpoints, said = checkpoint.open_checkpoints(run_dir, 3), []
    try:
        step, state, _ = checkpoints.restore_newest(abstract, lambda step, reason: said.append((step, reason)))
        return (step, state), said
    except UserError as error:
        return str(error), said
    finally:
        checkpoints.close()


def _differing(state, document):
    """Arrays of a restored state whose bytes are not those that were saved."""
    flat = checkpoint._flatten(state)
    return [
        name
        for name, array in document["arrays"].items()
        if checkpoint._digest(np.asarray(flat[name])) != array["sha256"]
    ]


def _trial(run_dir, original, way, rng):
    """(what was done, what is wrong with the answer or None)."""
    shutil.copytree(original, run_dir)
    *_, older, newest = checkpoint.list_steps(run_dir)
    document = checkpoint.read_document(run_dir / str(older))
    done = damage(run_dir / str(newest), way, rng)
    answer, said = _restore(run_dir, _abstract(document))
    if [step for step, _ in said] != [newest]:
        return done, f"not detected: restored {answer if isinstance(answer, str) else answer[0]}, said {said}"
    if isinstance(answer, str) or answer[0] != older:
        return done, f"not recovered: {answer}"
    if wrong := _differing(answer[1], document):
        return done, f"restored wrong: {', '.join(wrong)}"
    if not (run_dir / checkpoint.DAMAGED / f"{newest}-1").is_dir():
        return done, "the damaged one was not set aside"
    return done, None


def _whole_trial(run_dir, original, way, rng, arguments, expected):
    """As _trial, by command, to the end of the run."""
    shutil.copytree(original, run_dir)
    newest = checkpoint.list_steps(run_dir)[-1]
    done = damage(run_dir / str(newest), way, rng)
    code, output = finish(arguments, run_dir.with_name(f"{run_dir.name}.log"))
    if code != 0:
        return done, f"exit code {code}: {output[-300:]}"
    if f"ALERT checkpoint {newest} is damaged (" not in output:
        return done, "the damage was not told"
    found = differences(fingerprint(run_dir), expected)
    return done, f"the run ended differently: {', '.join(found)}" if found else None


def run(folder, data_dir, *, trials, seed, deadline, say=print, kinds=("bf16", "E4M3")):
    """The campaign. Returns a Part."""
    rng = random.Random(seed)
    given, answered, failures = collections.Counter(), collections.Counter(), []
    whole, whole_equal = 0, 0
    # The wholes end at a step that is no checkpoint of the copies, so that these have something left to do.
    originals = {}
    for kind in kinds:
        run_dir, expected = reference(folder, data_dir, kind, max_steps=120)
        partial = folder / f"partial-{kind}"
        finish(command(data_dir, partial, kind, max_steps=100), folder / f"partial-{kind}.log")
        originals[kind] = run_dir, expected, partial
    for number in range(trials):
        if deadline.is_over():
            break
        kind, way = kinds[number % len(kinds)], WAYS[number % len(WAYS)]
        run_dir, expected, partial = originals[kind]
        copy = folder / "damaged"
        if number % WHOLE_EVERY == WHOLE_EVERY - 1:
            whole += 1
            arguments = command(data_dir, copy, kind, max_steps=120)
            done, wrong = _whole_trial(copy, partial, way, rng, arguments, expected)
            whole_equal += wrong is None
        else:
            done, wrong = _trial(copy, partial, way, rng)
        shutil.rmtree(copy)
        given[way] += 1
        answered[way] += wrong is None
        if wrong is not None:
            failures.append(f"{kind}, {done}: {wrong}")
            say(f"trial {number + 1}: {failures[-1]}")
        elif number % 20 == 0:
            say(f"trial {number + 1} of {trials}: {done}: detected, recovered")
    of_all = _all_damaged(folder / "all", originals[kinds[-1]][2], rng)
    failures += of_all
    rows = [[way, given[way], answered[way]] for way in WAYS if given[way]]
    rows.append(["together", sum(given.values()), sum(answered.values())])
    lines = table(["damage to the newest checkpoint", "trials", "detected and recovered"], rows)
    answer = "one sentence each time, nothing moved, no fresh start" if not of_all else "not as it should be, see below"
    lines += [
        "",
        f"{whole} of them by command, to the end of the run, which then equals the uninterrupted one to the "
        f"bit in {whole_equal}. With every checkpoint damaged: {answer}.",
    ]
    return Part("Damaged checkpoints", lines, sum(given.values()), trials, failures)


def _all_damaged(run_dir, original, rng):
    """What is wrong with the answer to a folder in which every checkpoint is damaged."""
    shutil.copytree(original, run_dir)
    steps = checkpoint.list_steps(run_dir)
    abstract = _abstract(checkpoint.read_document(run_dir / str(steps[0])))
    for step in steps:
        damage(run_dir / str(step), "flipped bit", rng)
    before = sorted(str(path) for path in run_dir.rglob("*"))
    for _ in range(2):
        answer, said = _restore(run_dir, abstract)
        if not isinstance(answer, str) or "every checkpoint in" not in answer or len(said) != len(steps):
            return [f"all damaged: answered {answer}"]
    return [] if sorted(str(path) for path in run_dir.rglob("*")) == before else ["all damaged: files were moved"]
