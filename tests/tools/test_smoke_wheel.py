# SPDX-License-Identifier: Apache-2.0
"""tools/smoke_wheel.py says in which Pythons the wheel did not run, and fails where one was wanted."""

import pytest

from tools import smoke_wheel

OK, NO_TORCH = "OK, torch 2.13.0, selftest passed", "skipped, no torch in 1 interpreters found"


@pytest.mark.parametrize(
    ("outcomes", "arguments", "code", "said"),
    [
        ([OK, OK, OK], ["--require", "3.13"], 0, "the wheel ran in Python 3.11, 3.12, 3.13"),
        ([OK, NO_TORCH, NO_TORCH], [], 0, "the wheel ran in Python 3.11; NOT in 3.12 skipped, 3.13 skipped"),
        ([OK, NO_TORCH, OK], ["--require", "3.11", "--require", "3.12"], 1, "3.11, 3.13; NOT in 3.12 skipped"),
        ([OK, OK, RuntimeError("an import failed")], [], 1, "3.11, 3.12; NOT in 3.13 FAILED"),
        ([NO_TORCH] * 3, [], 1, "none; NOT in 3.11 skipped, 3.12 skipped, 3.13 skipped"),
    ],
)
def test_a_python_that_did_not_run_is_named(outcomes, arguments, code, said, monkeypatch, tmp_path, capsys):
    results = iter(outcomes)

    def try_wheel(*_):
        if isinstance(result := next(results), Exception):
            raise result
        return result

    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "lrkern-0-py3-none-any.whl").touch()
    monkeypatch.setattr(smoke_wheel, "ROOT", tmp_path)
    monkeypatch.setattr(smoke_wheel, "try_wheel", try_wheel)
    monkeypatch.setattr(
        smoke_wheel, "interpreters", lambda named: {version: ["python"] for version in smoke_wheel.TORCH}
    )
    assert smoke_wheel.main(["--no-build", *arguments]) == code
    assert capsys.readouterr().out.splitlines()[-1].endswith(said)
