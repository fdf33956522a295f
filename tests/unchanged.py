# SPDX-License-Identifier: Apache-2.0
"""Whether a refactoring changed a number, a message, a file or a public name: recorded before, compared after.

    python tests/unchanged.py record FILE [SECTION ...]     writes name -> hash (or text) as JSON
    python tests/unchanged.py compare FILE [SECTION ...]    prints every difference; names that are new are no fault
    python tests/unchanged.py pickles FOLDER                whole models by torch.save, with what they answer
    python tests/unchanged.py load FOLDER                   loads them and compares the answers bit for bit

Hashes hold for one machine and one torch; FILE says which. Sections: see SECTIONS. Inputs come from the registry and
from seeds in recorded/, and only lrkern's public names and the emulator are imported, so that this outlives what it
watches.
"""

import inspect
import json
import os
import platform
import sys
import tempfile
import warnings
from pathlib import Path

import peft
import torch
from recorded.adapters import adapted, files, net_of, patched, served, several
from recorded.common import attempt, digest, flat, rand, step
from recorded.kernels import calls, functional, ops, signatures
from recorded.layers import modules
from torch import nn

import lrkern.peft

# ---------------------------------------------------------------------------------------------------- whole models


def whole_models() -> dict:
    """Models that have been used, so that what they keep between calls is filled."""
    made = {
        "+".join(kinds): net_of(*kinds)
        for kinds in (("lora",), ("dora",), ("nola",), ("vera",), ("randlora",), ("paper",))
    }
    made |= {f"{kind} 16": net_of(kind, dtype=torch.bfloat16) for kind in ("dora", "vera")}
    made |= {f"peft {kind}": adapted(kind) for kind in ("plain", "dora", "vera", "randlora")} | {
        "peft mixed": several()
    }
    for name, model in made.items():
        if name.startswith("peft"):
            lrkern.peft.patch(model)
    return made


def answers(model: nn.Module) -> list[tuple[str, str]]:
    x = rand(
        6, 24, dtype=next(p.dtype for name, p in model.named_parameters() if name.endswith("up.base_layer.weight"))
    )
    with torch.no_grad():
        model.eval()(x)
        found = {"eval": model(x)}
        if isinstance(model, peft.PeftModel) and len(model.peft_config) > 1:
            found["mixed"] = model(x, adapter_names=["a", "b", "c", "__base__", "b", "a"])
    found |= {"step": step(model, x), "repr": repr(model)}
    found |= {"report": str(lrkern.peft.report(model))} if isinstance(model, peft.PeftModel) else {}
    return list(flat("", found))


def write_models(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in whole_models().items():
        torch.save({"answers": answers(model), "model": model}, folder / f"{name}.pt")
    print(f"{len(whole_models())} models in {folder}")


def load_models(folder: Path) -> int:
    wrong = 0
    for path in sorted(folder.glob("*.pt")):
        saved = attempt(torch.load, path, weights_only=False)
        found = attempt(answers, saved["model"]) if isinstance(saved, dict) else saved
        if isinstance(found, str):
            print(f"{path.name}: {found[:300]}")
        else:
            for (key, was), (_, now) in zip(saved["answers"], found, strict=True):
                if was != now:
                    print(f"{path.name}{key}\n  was {was[:300]}\n  is  {now[:300]}")
        wrong += isinstance(found, str) or found != saved["answers"]
    print(f"{wrong} models differ or do not load")
    return wrong


# ---------------------------------------------------------------------------------------------------- the two commands

SECTIONS = {f.__name__: f for f in (signatures, ops, calls, functional, modules, files, patched, served)}
MACHINE = {
    "torch": torch.__version__,
    "peft": peft.__version__,
    "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
}


def everything(names: list[str], recording: bool) -> dict[str, str]:
    book = {}
    for name in names or SECTIONS:
        with tempfile.TemporaryDirectory(prefix="unchanged-") as tmp:
            torch.manual_seed(0)
            section = SECTIONS[name]
            more = [Path(tmp)] if "tmp" in inspect.signature(section).parameters else []
            for key, value in section(recording, *more):
                for where, text in flat(f"{name}/{key}", value):
                    assert where not in book, f"two of the name {where}"
                    book[where] = text
        print(f"{name}: {sum(key.startswith(f'{name}/') for key in book)} names", flush=True)
    return book


def compare(was: dict[str, str], now: dict[str, str]) -> int:
    short = lambda text: (
        "nothing" if text is None else text if len(text) < 300 else f"{text[:300]} ... ({digest(text.encode())})"
    )
    differ = [key for key in was if was[key] != now.get(key)]
    for key in differ:
        print(f"{key}\n  was {short(was[key])}\n  is  {short(now.get(key))}")
    new = [key for key in now if key not in was]
    for key in new[:200]:
        print(f"new: {key}")
    print(f"{len(was)} names, {len(differ)} differ, {len(new)} are new")
    return len(differ)


def main(command: str, path: str, *sections: str) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if command == "pickles":
        write_models(Path(path))
    elif command == "load":
        return load_models(Path(path)) > 0
    elif command == "record":
        Path(path).write_text(json.dumps({"machine": MACHINE, "book": everything(sections, True)}, indent=0))
    elif command == "compare":
        recorded = json.loads(Path(path).read_text())
        if recorded["machine"] != MACHINE:
            raise SystemExit(f"recorded with {recorded['machine']}, this is {MACHINE}")
        chosen = sections or tuple(dict.fromkeys(key.split("/")[0] for key in recorded["book"]))
        was = {key: text for key, text in recorded["book"].items() if key.split("/")[0] in chosen}
        return compare(was, everything(chosen, False)) > 0
    else:
        raise SystemExit(__doc__)
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets stands in PEFT's files and messages
        os.execve(sys.executable, sys.orig_argv, os.environ | {"PYTHONHASHSEED": "0"})
    sys.exit(main(*sys.argv[1:]))
