"""The tests with the oldest and the newest supported Python and torch.

``nox`` runs both (each installs its own torch), ``nox -s "tests(oldest)" -- -m "not slow"`` one of them in part.
"""

import nox


@nox.session
@nox.parametrize(("python", "torch"), [("3.11", "torch==2.10.*"), ("3.13", "torch")], ids=["oldest", "newest"])
def tests(session: nox.Session, torch: str) -> None:
    """Run the tests."""
    session.install(torch, "--editable", ".[dev]")
    session.run("python", "-m", "pytest", "-n", "auto", "--dist", "worksteal", *session.posargs)
