"""One command run in this process."""

from tests.helpers import make_scan_matter
from vmeanba_fx.cli import main
from vmeanba_fx.models import vmamba_digits

BY_NAME = "vmamba_digits(depths=[1, 2], dims=[8, 12])"


def tiny():
    return make_scan_matter(vmamba_digits(depths=(1, 2), dims=(8, 12))).eval()


def run(capsys, *argv):
    """(exit code, standard output, standard error) of one command."""
    capsys.readouterr()
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *argv):
    """The one line an unsuccessful command prints."""
    code, out, err = run(capsys, *argv)
    lines = [line for line in err.splitlines() if line.startswith("vmeanba-fx: error: ")]
    assert code == 1 and set(out.splitlines()) <= {"hello from the model"}
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]
