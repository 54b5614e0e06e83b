"""What a machine says about its processor."""

from pathlib import Path

import pytest

from edgeprune.deploy.device import system


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu sse avx2 avx512f avx512bw\n", True),
        ("processor\t: 0\nmodel name\t: Ryzen\nflags\t\t: fpu sse avx2 avx512_of_no_kind\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd evtstrm aes\n", None),  # ARM
        (None, None),
    ],
)
def test_avx512_is_read_from_the_flags(
    cpuinfo: str | None, expected: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag itself counts, not one that begins like it; a processor without x86's list does not say."""
    (tmp_path / "proc").mkdir()
    if cpuinfo is not None:
        (tmp_path / "proc" / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(system, "ROOT", str(tmp_path))
    assert system.avx512() is expected
