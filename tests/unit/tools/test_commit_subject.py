"""The check of commit subjects, alone and as a hook that `make setup` installs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.commit_subject import message_faults

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    "message",
    [
        "Refuse subjects that are too long",
        "Write and read what a push has sent",
        "Embed the position\n\nAdded a body of any length and mood, which ends with a full stop.\n",
        "Bring engines back",
        "Merge names of the commands",
        "Merge settings",
        "Merge plainer names of models, trainer and push",
        "Pass groups as arguments",
        "Focus the page",
        "# the template of somebody\n\nAdd a test\n# Please enter the commit message.",
        "x".upper() + "y" * 71,
        "Merge branch 'evidence' into one whose name is so long that the subject is too\n\nWhy.",
        'Revert "Added things."',
        "fixup! Add a test",
        "Add a test\n# ------------------------ >8 ------------------------\ndiff --git a/x b/x.",
        "# ------------------------ >8 ------------------------\ndiff --git a/x b/x.",
        "",
    ],
)
def test_subjects_that_pass(message):
    assert message_faults(message) == []


@pytest.mark.parametrize(
    ("subject", "fault"),
    [
        ("Add " + "a" * 69, "has 73 characters"),
        ("Add one line that is\nfolded into a second one without an empty line between", "has 75"),
        ("Add a test.", "full stop"),
        ("Add a test; mend a page", "joins ideas"),
        ("Add a test, and mend a page", "joins ideas"),
        ("Write, read and compare what a push has sent", "joins ideas"),
        ("Name the run, byte counts and checks for what they hold", "joins ideas"),
        ("Merge y-study", "names a branch"),
        ("Merge fixes/push-order", "names a branch"),
        ("add a test", "'add' is no verb with a capital"),
        ("Evidence: the last runs", "'Evidence:' is no verb"),
        ("docs/startup.md: shorter", "is no verb"),
        ("The last runs", "'The' is no verb"),
        ("Added a test", "'Added' is not in the imperative"),
        ("Adding a test", "'Adding' is not in the imperative"),
        ("Adds a test", "'Adds' is not in the imperative"),
        ("Rewards read without a comma", "'Rewards' is not in the imperative"),
        ("Merge branch 'pages'", "a body says what the branch brings"),
        ("Merge branch 'pages'\n\n# Conflicts:\n#\tREADME.md", "a body says"),
    ],
)
def test_subjects_that_are_refused(subject, fault):
    (said,) = message_faults(subject)
    assert fault in said


def test_a_commit_of_many_files_needs_a_body():
    assert message_faults("Rename two packages", 5) == []
    assert "6 files" in message_faults("Rename two packages", 6)[0]
    message = "Rename two packages\n\nBy sed, as the map says."
    assert message_faults(message, 60) == []
    (said,) = message_faults(message, 61)
    assert "61 files" in said and "`Command:`" in said
    assert message_faults(f"{message}\nCommand: sed -i s/a/b/ *.py", 816) == []
    assert message_faults(message.replace("Rename", "Merge", 1), 816) == []


@pytest.mark.parametrize(
    "listed",
    [
        "Round → PushRound",
        "- `controller/session.py` -> controller/rl_run.py",
        "Old → new: _weights → weight_bytes, fill → fill_fraction,",
    ],
)
def test_a_list_of_renames_needs_the_command_that_made_them(listed):
    message = f"Name the rounds of a push in full\n\nThey are rounds.\n{listed}\n"
    (said,) = message_faults(message)
    assert "`Command:`" in said and "`By hand:`" in said
    assert message_faults(message + "Command:\n") == [said], "which command?"
    for line in ("Command: git grep -lw Round | xargs sed -i s/Round/PushRound/", "By hand: all."):
        assert message_faults(f"{message}\n{line}\n") == []
    assert message_faults(message.replace("Name", "Merge names of", 1)) == []


@pytest.mark.parametrize("body", ["From 22.4% → 94.6%.", "`states(root) -> dict`", "a -> 3", "->"])
def test_other_arrows_are_no_renames(body):
    assert message_faults(f"Measure the demo\n\n{body}\n") == []


def test_renamed_python_files_need_the_command_that_renamed_them():
    message = "Name the rounds of a push in full\n\nThey are rounds.\n"
    (said,) = message_faults(message, 2, num_moved=2)
    assert "2 Python files" in said and "`Command:`" in said and "`By hand:`" in said
    assert "1 Python file:" in message_faults(message, 1, num_moved=1)[0]
    listed = message + "round.py → push_round.py"
    assert message_faults(listed, num_moved=1) == message_faults(message, num_moved=1), "said once"
    for line in ("Command: git mv round.py push_round.py", "By hand: it was split."):
        assert message_faults(f"{message}\n{line}\n", num_moved=2) == []
    assert message_faults(message.replace("Name", "Merge names of", 1), num_moved=2) == []


def test_every_fault_is_said():
    assert len(message_faults("added " + "a" * 70 + ".")) == 3


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with the Makefile, the hook and the check, without a user's settings."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for name in ("Makefile", ".githooks/commit-msg", "tools/commit_subject.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    git(tmp_path, "init", "-q")
    return tmp_path


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", folder, *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def install(folder):
    subprocess.run(["make", "-s", "hooks"], cwd=folder, check=True, capture_output=True)
    return git(folder, "config", "--get", "core.hooksPath").stdout.strip()


def test_the_hook_refuses_and_accepts(clone):
    assert install(clone) == ".githooks"
    refused = git(clone, "commit", "--allow-empty", "-m", "Added a test.")
    assert refused.returncode != 0
    assert "full stop" in refused.stderr and "imperative" in refused.stderr
    assert git(clone, "log").returncode != 0, "nothing is committed"
    assert git(clone, "commit", "--allow-empty", "-m", "Add a test").returncode == 0
    assert git(clone, "log", "--format=%s").stdout == "Add a test\n"
    for number in range(21):
        (clone / f"{number} é.txt").touch()
    git(clone, "add", "*.txt")
    refused = git(clone, "commit", "-m", "Add files")
    assert refused.returncode != 0 and "21 files" in refused.stderr
    assert git(clone, "commit", "-m", "Add files", "-m", "They are empty.").returncode == 0


def test_renamed_files_are_told_from_new_ones_by_hook_and_log(clone):
    install(clone)
    for name in ("é.py", "two.py", "three.txt"):
        (clone / name).write_text(f"The text of {name}.\n" * 20)
    git(clone, "add", "é.py", "two.py", "three.txt")
    assert git(clone, "commit", "-m", "Add files").returncode == 0
    git(clone, "config", "diff.renames", "false")
    git(clone, "mv", "three.txt", "four.txt")
    assert git(clone, "commit", "-m", "Rename a text").returncode == 0
    git(clone, "mv", "é.py", "è.py")
    git(clone, "mv", "two.py", "second.py")
    commit = ("commit", "-m", "Rename the modules")
    refused = git(clone, *commit)
    assert refused.returncode != 0 and "it renames 2 Python files" in refused.stderr
    named = ("-m", "Command: git mv two.py second.py")
    assert git(clone, *commit, *named).returncode == 0
    command = [sys.executable, clone / "tools/commit_subject.py", "--log", "-5"]
    assert subprocess.run(command, cwd=clone).returncode == 0
    git(clone, "commit", "--amend", "--no-verify", "-m", "Rename the modules")
    found = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1 and "it renames 2 Python files" in found.stderr


def test_commits_that_the_hook_has_not_seen_are_found_in_the_log(clone):
    def log(commits):
        command = [sys.executable, clone / "tools/commit_subject.py", "--log", commits]
        return subprocess.run(command, cwd=clone, capture_output=True, text=True)

    git(clone, "commit", "--allow-empty", "-m", "Add a test")
    assert log("-5").returncode == 0
    git(clone, "add", ".")
    for number in range(21):
        (clone / f"{number}.txt").touch()
    git(clone, "commit", "-m", "Added a test")
    git(clone, "add", "*.txt")
    git(clone, "commit", "-m", "Add files")
    found = log("HEAD~2..HEAD")
    assert found.returncode == 1
    assert found.stderr.count("imperative") == 1 and found.stderr.count("21 files") == 1
    assert log("-1").stderr.count("\n") == 1


def test_a_shallow_clone_is_read_as_it_is(clone, tmp_path_factory):
    (clone / "one.txt").touch()
    git(clone, "config", "core.hooksPath", "none")
    for number in range(21):
        (clone / f"{number}.txt").touch()
    git(clone, "add", ".")
    git(clone, "commit", "-m", "Add files")
    git(clone, "commit", "--allow-empty", "-m", "Name a round")
    shallow = tmp_path_factory.mktemp("shallow")
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{clone}", shallow], check=True)
    command = [sys.executable, clone / "tools/commit_subject.py", "--log", "-20"]
    assert subprocess.run(command, cwd=shallow).returncode == 0
    git(clone, "commit", "--allow-empty", "-m", "Name a round", "-m", "Round → PushRound")
    found = subprocess.run(command, cwd=clone, capture_output=True, text=True).stderr
    assert found.count("lists renames") == 1 and found.count("22 files") == 0
    assert found.count(" files: a body") == 1, "of the first commit"


def test_hooks_that_a_clone_has_stay(clone):
    git(clone, "config", "core.hooksPath", "mine")
    assert install(clone) == "mine"
    git(clone, "config", "--unset", "core.hooksPath")
    hooks = clone / ".git/hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "pre-commit").write_text("")
    assert install(clone) == ""
    (hooks / "pre-commit").unlink()
    (hooks / "pre-commit.sample").write_text("")
    assert install(clone) == ".githooks"


def test_outside_a_repository_nothing_is_installed(clone):
    shutil.rmtree(clone / ".git")
    subprocess.run(["make", "-s", "hooks"], cwd=clone, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("line", "passes"),
    [
        ("Command: git mv tools/a.py tools/b.py", True),
        ("Command: `sed -i s/old/new/ a.py`", True),
        ("Command: a script put the values into the list", False),
        ("Command: the same as before", False),
        ("Command: sed -i s/a/b/ c.py. By hand: the docstrings", False),
        ("Command: sed", False),
    ],
)
def test_a_command_is_one_that_can_be_run(line, passes):
    faults = message_faults(f"Rename a file\n\nWhy.\n\n{line}\n", num_moved=1)
    assert passes == (not faults), faults
