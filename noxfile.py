"""Every check of this repository, one session each: ``nox -l`` lists them, ``nox -s tests`` runs one.

What a session tests is what a user installs: wheels built from the source distributions, never the checkout.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False  # they are skipped with a message, on a CI machine too
nox.options.download_python = "never"
nox.options.sessions = ["lint", "typecheck", "tests"]

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
PINNED = ("-c", "constraints.txt")
LAYERS = {  # each package after the layers below it
    "comm": ("comm",),
    "core": ("comm", "core"),
    "parallel": ("comm", "parallel"),
    "convert": ("comm", "core", "parallel", "convert"),
}
PACKAGE_TESTS = tuple(f"packages/syncbn-{package}/tests" for package in LAYERS)
ALL_TESTS = (*PACKAGE_TESTS, "tests")
TEST_TOOLS = ("pytest", "hypothesis", "ninja")  # ninja builds the simulated accelerator
DEMO_TOOLS = ("scikit-learn", "tqdm", "matplotlib")
DOCS_TOOLS = ("mkdocs", "mkdocs-material", "mkdocstrings[python]", "ruff")  # ruff breaks long signatures
# What a newer release of the libraries brings; not pinned to what the other sessions test.
NEWEST = ("torch==2.14.1", "torchvision==0.29.1", "timm")

SHORT = "not soak and not full"
FULL = "full and not soak"

wheels: dict[str, str] = {}  # filled once per run of nox, by the session that first needs them


def build_wheels(session: nox.Session) -> None:
    """Build the source distribution of every package, and its wheel from that."""
    if wheels:
        return
    session.log("building the four packages ...")
    session.install("build", "hatchling", *PINNED)
    shutil.rmtree(DIST, ignore_errors=True)
    for package in LAYERS:
        source = f"packages/syncbn-{package}"
        session.run("python", "-m", "build", "--no-isolation", "--outdir", str(DIST), source)
    for package in LAYERS:
        (wheel,) = DIST.glob(f"syncbn_{package}-*.whl")
        wheels[package] = str(wheel)


def install_only(session: nox.Session, packages: Iterable[str], versions: Iterable[str] = PINNED) -> None:
    """Make these packages, by their wheels, the only ones of ours in the session's environment."""
    build_wheels(session)
    session.env["PYTHONPATH"] = ""  # a checkout named there would come before the wheels
    session.env["OMP_WAIT_POLICY"] = "passive"  # on a busy machine, threads that spin cost a hundredfold
    ours = [f"syncbn-{package}" for package in LAYERS]
    session.run("python", "-m", "pip", "uninstall", "-qq", "--yes", *ours)
    session.install(*(wheels[package] for package in packages), *versions)
    show_absent(session, *(f"syncbn_{package}" for package in LAYERS if package not in packages))


def show_absent(session: nox.Session, *modules: str) -> None:
    """Fail where one of these modules can be imported."""
    look = (
        "import importlib.util, sys; found = [m for m in sys.argv[1:] if importlib.util.find_spec(m)];"
        "sys.exit(f'expected not to be installed: {found}' if found else 0)"
    )
    session.run("python", "-c", look, *modules)


def install_torch(session: nox.Session, *tools: str) -> None:
    """Install torch and tools; say so before, since it may take minutes without a word."""
    session.log("installing torch: minutes, and possibly gigabytes, the first time (see CONTRIBUTING.md)")
    session.install(*tools, "torch", *PINNED)


def run_pytest(
    session: nox.Session, *targets: str, marks: str = "not soak", accelerator: bool = True
) -> None:
    """Run tests, and the examples in the docstrings of the targets that are packages."""
    no_tests_collected = 5  # a package may have none with these marks
    # torch prepares for the devices that it knows at the first backward. So the simulated accelerator, once
    # loaded, is there for good, and loaded late it does not work.
    for process in ("not accelerator", "accelerator") if accelerator else ("not accelerator",):
        session.run(
            *("python", "-m", "pytest", "-m", f"{marks} and {process}", "--doctest-modules", "--pyargs"),
            *targets,
            *session.posargs,
            success_codes=[0] if marks == SHORT and process.startswith("not") else [0, no_tests_collected],
        )


def run_alone(session: nox.Session, package: str, marks: str) -> None:
    """Run one package's tests on nothing but the layers below it."""
    install_only(session, LAYERS[package])
    folder = f"packages/syncbn-{package}/tests"
    accelerator = any("accelerator" in path.read_text("utf-8") for path in (ROOT / folder).rglob("*.py"))
    run_pytest(session, folder, f"syncbn_{package}", marks=marks, accelerator=accelerator)


def public_surface() -> list[str]:
    """Find the tests of what each package shows: its names, its README, its types."""
    names = ("test_exports.py", "test_readme.py", "test_typing.py")
    paths = (f"{folder}/{name}" for folder in PACKAGE_TESTS for name in names)
    return [path for path in paths if (ROOT / path).exists()]


def run_everything_together(session: nox.Session, versions: Iterable[str]) -> None:
    """Run all tests of all packages in one process, on other versions than the pinned ones."""
    install_only(session, LAYERS, versions)
    run_pytest(session, *ALL_TESTS)


@nox.session
@nox.parametrize(
    ("python", "suite"),
    [nox.param(version, "comm", id=f"comm-{version}") for version in ("3.11", "3.12", "3.13")]
    + [nox.param(None, "torch", id="torch")],
)
def tests(session: nox.Session, suite: str) -> None:
    """Test each package alone, on its wheel and those of the layers below it, then what needs all four."""
    if suite == "comm":
        session.install(*TEST_TOOLS, *PINNED)
        show_absent(session, "torch")
        run_alone(session, "comm", SHORT)
        return
    install_torch(session, *TEST_TOOLS, *DEMO_TOOLS, "numpy")
    for package in ("core", "parallel", "convert"):
        run_alone(session, package, SHORT)
    install_only(session, LAYERS)
    run_pytest(session, "tests", *public_surface(), marks=SHORT)


@nox.session
def tests_full(session: nox.Session) -> None:
    """Run the tests that `tests` leaves out: the rest of large matrices."""
    install_torch(session, *TEST_TOOLS, *DEMO_TOOLS, "numpy")
    for package in LAYERS:
        run_alone(session, package, FULL)
    install_only(session, LAYERS)
    run_pytest(session, "tests", marks=FULL)


@nox.session(venv_backend="none")
def gpu_tests(session: nox.Session) -> None:
    """Run what is marked `gpu`, each package alone and all together, with the torch that this machine has."""
    # The torch that fits this machine's driver is the one installed on it, and there may be no network: so
    # nothing is installed here, and the path names the sources.
    python = python_with_cuda()
    if python is None:
        session.skip("no Python here has a torch that sees a CUDA device")

    def run(packages: Iterable[str], *targets: str) -> None:
        path = os.pathsep.join(str(ROOT / f"packages/syncbn-{package}/src") for package in packages)
        no_tests_collected = 5  # comm has none that need a GPU
        session.run(
            *(python, "-m", "pytest", "-m", "gpu", *targets, *session.posargs),
            env={"PYTHONPATH": path},
            external=True,
            success_codes=[0, no_tests_collected],
        )

    for package, layers in LAYERS.items():
        run(layers, f"packages/syncbn-{package}/tests")
    run(LAYERS, *ALL_TESTS)


def python_with_cuda() -> str | None:
    """Find the first of nox's own Python and those on the path whose torch sees a CUDA device."""
    look = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    for python in (sys.executable, shutil.which("python3"), shutil.which("python")):
        if python and subprocess.run([python, "-c", look], capture_output=True, check=False).returncode == 0:
            return python
    return None


@nox.session
def demo(session: nox.Session) -> None:
    """Segment handwritten digits: whole batch, replicas that are synchronized, replicas that are not."""
    install_torch(session, *DEMO_TOOLS)
    install_only(session, LAYERS)
    printed = Path(session.create_tmp()) / "digits.txt"
    with printed.open("w") as file:  # the progress bar goes to the terminal
        session.run("python", "examples/digits.py", *session.posargs, stdout=file, stderr=None)
    print(printed.read_text())
    if not session.posargs:
        session.run("python", "tests/compare_figures.py", "README.md", str(printed))


@nox.session
def demo_distributed(session: nox.Session) -> None:
    """Segment handwritten digits in two processes, with and without replicas in each of them."""
    install_torch(session, *DEMO_TOOLS)
    install_only(session, LAYERS)
    torchrun = ("torchrun", "--standalone", "--nproc-per-node", "2")
    session.run(*torchrun, "tests/without_shutdown.py", "examples/digits_ddp.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure layer, rounds, model and replication beside what they have to be compared with."""
    install_torch(session, "matplotlib", "numpy")
    install_only(session, LAYERS)
    del session.env["OMP_WAIT_POLICY"]  # threads wait as they do at the user's
    for program in ("layer", "rounds", "model", "replication"):
        session.run("python", f"benchmarks/{program}.py", *session.posargs)


@nox.session
def bench_processes(session: nox.Session) -> None:
    """Measure one layer over 1, 2, 4 and 8 processes, and a step that is compiled over two."""
    install_torch(session, "matplotlib", "numpy")
    install_only(session, LAYERS)
    for program in ("processes", "compiled"):
        session.run("python", f"benchmarks/{program}.py", *session.posargs)


@nox.session
def ecosystem(session: nox.Session) -> None:
    """Test models and tools of other libraries, and renew the tables in docs/ecosystem.md."""
    install_torch(session, *TEST_TOOLS, "numpy", "-r", "tests/ecosystem/requirements.txt")
    install_only(session, LAYERS)
    # A selection of the tests would leave a selection of the rows.
    tables = () if session.posargs else ("--tables", "docs/ecosystem.md")
    session.run("python", "-m", "pytest", "-s", *tables, "tests/ecosystem", *session.posargs)
    if not session.posargs:  # skipped in the other sessions, which do not install onnx
        session.run("python", "-m", "pytest", "tests/compile/test_export.py", "-k", "onnx")


@nox.session
def lint(session: nox.Session) -> None:
    """Check the style and the format of every Python file."""
    session.install("ruff", *PINNED)
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check the types of every package, and of a program that calls it as installed."""
    install_torch(session, "mypy", "numpy")
    install_only(session, LAYERS)
    for package in LAYERS:
        session.run("mypy", f"packages/syncbn-{package}/src")
        session.run("mypy", f"packages/syncbn-{package}/tests/typed_caller.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/, with warnings as errors and without a network."""
    session.install(*DOCS_TOOLS, *PINNED)
    session.env["NO_MKDOCS_2_WARNING"] = "1"  # an advertisement for another program
    session.run("mkdocs", "build", "--strict", "--clean", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build source distributions and wheels of all packages into dist/."""
    build_wheels(session)
    for path in sorted(DIST.iterdir()):
        session.log(str(path.relative_to(ROOT)))


@nox.session
def install(session: nox.Session) -> None:
    """Install the packages as users do, by their names, into empty environments beside torch."""
    install_torch(session, "pytest")
    build_wheels(session)
    # Without the fixtures of the other tests, which import the packages.
    session.run("python", "-m", "pytest", "--confcutdir=tests/install", "tests/install", *session.posargs)


@nox.session
def release(session: nox.Session) -> None:
    """Check that versions, changelogs, tags and ranges agree; build; check what would be uploaded.

    What follows ``--`` names the packages to release: docs/releasing.md.
    """
    session.install("packaging", "twine", *PINNED)
    session.run("python", "tests/check_release.py", *session.posargs)
    build_wheels(session)
    session.run("twine", "check", "--strict", *(str(path) for path in sorted(DIST.iterdir())))


@nox.session(python="3.11")
def minimums(session: nox.Session) -> None:
    """Run all tests on the lowest versions that are supported; installs some 5 GB."""
    # The wheels of this torch import only beside the CUDA libraries they were built for: 5 GB.
    lowest = ("torch==2.4.0", "numpy==1.26.4")
    session.install(*TEST_TOOLS, *DEMO_TOOLS, *lowest)
    session.env["PYTEST_ADDOPTS"] = "-W default::FutureWarning"  # it warns of itself
    run_everything_together(session, lowest)


@nox.session(python=["3.11", "3.13"])
def newest(session: nox.Session) -> None:
    """Run all tests on the newest torch, and models of torchvision and timm; installs some 5 GB."""
    session.install(*TEST_TOOLS, *DEMO_TOOLS, "numpy", *NEWEST)
    run_everything_together(session, NEWEST)
    # A selection of the tests would leave a selection of the rows.
    tables = () if session.posargs else ("--tables", "docs/ecosystem.md")
    session.run("python", "-m", "pytest", "-s", *tables, "tests/ecosystem/test_newest.py", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Run a million rounds of the comm layer and watch memory and threads."""
    session.install(*TEST_TOOLS, *PINNED)
    install_only(session, ["comm"])
    session.run("python", "-m", "pytest", "-m", "soak", "-s", "packages/syncbn-comm/tests", *session.posargs)
