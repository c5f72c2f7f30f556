"""What is looked at before anything is queued, without a cluster: file systems, time limits, site files, scripts."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from hope_train.config.load import load_config, validate
from hope_train.errors import UserError
from launch.checks import check_interpreter, check_plan, check_shared, check_time, file_system
from launch.client import Partition, Slurm, SlurmError
from launch.cluster import step_order
from launch.layout import fixed_layout
from launch.script import environment, render
from launch.site import Site, load_site, site_files
from launch.snapshot import take_snapshot

ROOT = Path(__file__).resolve().parents[2]
MOUNTS = """overlay / overlay rw 0 0
tmpfs /tmp tmpfs rw 0 0
server:/export /home nfs4 rw 0 0
lustre@o2ib:/scratch /scratch\\040one lustre rw 0 0
"""
PARTITION = Partition("train", True, ("n1",), None, 3600, True)


def site(**fields: Any) -> Site:
    return validate(Site, fields)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/data/runs", ("/", "overlay")),
        ("/tmp/x", ("/tmp", "tmpfs")),
        ("/home/me/runs/a", ("/home", "nfs4")),
        ("/scratch one/a", ("/scratch one", "lustre")),
        ("/homestead", ("/", "overlay")),
    ],
)
def test_the_file_system_under_a_path(path: str, found: tuple[str, str]) -> None:
    assert file_system(Path(path), MOUNTS) == found


def test_a_run_directory_on_a_disk_of_one_machine_is_refused() -> None:
    for path in ("/tmp/run", "/data/run"):
        with pytest.raises(UserError, match="a disk of this machine alone"):
            check_shared(Path(path), site(), MOUNTS)
    check_shared(Path("/home/me/run"), site(), MOUNTS)
    check_shared(Path("/data/run"), site(shared=["/data"]), MOUNTS)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"time": "2:00:00"}, "longer than partition train allows"),
        ({"time": "5"}, "leaves no time to train"),
        ({"time": "1:00:00", "survive": {"lead_s": 3600}}, "leaves no time to train"),
    ],
)
def test_time_limits_that_cannot_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_time(PARTITION, site(**fields))


def test_without_a_time_limit_the_longest_is_asked_for() -> None:
    assert check_time(PARTITION, site()) == "01:00:00"
    assert check_time(PARTITION, site(time="30")) == "30"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"nodes": "0"}, "at least 1"),
        ({"nodes": "4-2"}, "from less to more"),
        ({"nodes": "many"}, "nodes"),
        ({"time": "soon"}, "as Slurm does"),
        ({"partion": "x"}, "did you mean `partition`"),
        ({"launcher": "mpirun"}, "launcher"),
    ],
)
def test_site_files_with_mistakes(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(yaml.safe_dump(fields), encoding="utf-8")
    with pytest.raises(UserError, match=said):
        load_site(str(file), {})


def test_the_command_line_goes_over_the_site_file(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("partition: a\naccount: b\nnodes: 4\nenvironment: {NCCL_DEBUG: 1}\nsurvive: {step_s: 9}\n")
    found = load_site(str(file), {"partition": "c", "account": None, "survive": {"lead_s": 60, "max_failures": None}})
    assert (found.partition, found.account, found.node_range) == ("c", "b", (4, 4))
    assert (found.survive.step_s, found.survive.lead_s, found.survive.max_failures) == (9, 60, 3)
    assert found.environment == {"NCCL_DEBUG": "1"}


def test_site_files_are_found_from_the_weakest_to_the_strongest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOPE_SITE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    inside = tmp_path / "repository" / "deep"
    inside.mkdir(parents=True)
    (tmp_path / "repository" / ".git").mkdir()
    (tmp_path / "site.yaml").write_text("{}")  # outside the repository: not ours
    assert site_files(inside) == []
    own, shared = tmp_path / "config" / "hope" / "site.yaml", tmp_path / "repository" / "site.yaml"
    for file in (own, shared):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    assert site_files(inside) == [own, shared]
    monkeypatch.setenv("HOPE_SITE", "elsewhere.yaml")
    assert site_files(inside) == [Path("elsewhere.yaml")]


def script(found: Site, **more: Any) -> str:
    given: dict[str, Any] = {
        "name": "hope-a",
        "submission": Path("/runs/a b/launch/submissions/1"),
        "run_dir": Path("/runs/a b"),
        "working_directory": Path("/home/me/it's here"),
        "python": "/venv/bin/python",
        "code": Path("/runs/a b/launch/code/x"),
        "gpus_per_node": 8,
        "time": "1-00:00:00",
    }
    return render(found, **{**given, **more})


def test_the_script_is_bash_and_says_what_was_asked_for() -> None:
    text = script(
        site(
            partition="gpu",
            account="us",
            nodes="8-16",
            exclude="n[3-4]",
            modules=["cuda/12"],
            setup=["ulimit -l unlimited"],
            environment={"A": "x y"},
            interface="ib0",
            extra=["--hint=nomultithread"],
        ),
        dependency="afterok:3",
        array="0-3%2",
    )
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    for line in (
        "--partition=gpu",
        "--account=us",
        "--nodes=8-16",
        "--exclude=n[3-4]",
        "--gpus-per-node=8",
        "--time=1-00:00:00",
        "--dependency=afterok:3",
        "--array=0-3%2",
        "--signal=B:USR1@300",
        "--requeue",
        "--exclusive",
        "--hint=nomultithread",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "module load cuda/12\n" in text
    assert "\nulimit -l unlimited\n" in text
    assert "export A='x y'\n" in text
    assert "export NCCL_SOCKET_IFNAME=ib0\n" in text
    assert "{{" not in text


def test_a_run_directory_may_have_any_name() -> None:
    text = script(site(), submission=Path("/runs/a b/100%j/launch/submissions/1"))
    assert '#SBATCH --output="/runs/a b/100%%j/launch/submissions/1/job-%j.out"\n' in text


def test_the_traps_stand_before_anything_that_takes_time() -> None:
    lines = [line for line in script(site()).splitlines() if line and not line.startswith("#")]
    assert lines[0].startswith("signals=")
    assert lines[1].startswith("trap ")
    assert lines[2].startswith("trap ")


def test_an_interface_that_is_excluded_is_no_word_for_gloo() -> None:
    assert environment(site(interface="^lo")) == {"PYTHONUNBUFFERED": "1", "NCCL_SOCKET_IFNAME": "^lo"}


def test_a_template_of_one_s_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.sh"
    file.write_text("#!/bin/bash\n# {{ name }} {{ site.account }}\n", encoding="utf-8")
    assert script(site(template=str(file), account="us")) == "#!/bin/bash\n# hope-a us\n"
    file.write_text("echo {{ name }}\n", encoding="utf-8")
    with pytest.raises(UserError, match="its first line must be #!"):
        script(site(template=str(file)))
    file.write_text("{{ nothing_of_the_kind }}", encoding="utf-8")
    with pytest.raises(UserError, match="nothing_of_the_kind"):
        script(site(template=str(file)))
    with pytest.raises(UserError, match="cannot be read"):
        script(site(template=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("container", "name", "inside"),
    [
        (None, "hope-train", []),
        (
            {"image": "i.sqsh", "mounts": ["/a:/b"]},
            "hope-train",
            ["--container-image=i.sqsh", "--container-mounts=/a:/b"],
        ),
        ({"image": "i.sqsh"}, "hope-stacks", []),  # py-spy looks at the processes from outside
        (
            {"image": "i.sif", "runtime": "apptainer", "mounts": ["/a", "/c"]},
            "hope-health",
            ["apptainer", "exec", "--nv", "--bind", "/a", "--bind", "/c", "i.sif"],
        ),
    ],
)
def test_a_job_step(container: dict[str, Any] | None, name: str, inside: list[str]) -> None:
    found = step_order(
        site(container=container, srun_extra=["--mpi=none"]), ["n1", "n3"], 4, ["python", "-m", "x"], name, "32"
    )
    assert found[:4] == ["srun", f"--job-name={name}", "--nodes=2", "--nodelist=n1,n3"]
    assert {"--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=8", "--mpi=none"} <= set(found)
    assert found[found.index("--mpi=none") + 1 :] == [*inside, "python", "-m", "x"]


def test_a_run_that_does_not_fit_its_device_is_refused() -> None:
    config = load_config(ROOT / "configs" / "hope_1b3.yaml")
    layout = fixed_layout(config, 1, 8)
    verdict, _ = check_plan(config, site(device="h200"), layout)
    assert verdict.startswith("fits")
    with pytest.raises(UserError, match="does not fit"):
        check_plan(config, site(device="l4"), layout)
    assert check_plan(config, site(), layout) == ("", [])


def test_nodes_are_not_sent_an_interpreter_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    check_interpreter(site())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="has no torch"):
        check_interpreter(site())
    check_interpreter(site(python="/nodes/python"))
    check_interpreter(site(container={"image": "i.sif"}))


def repository(folder: Path) -> Path:
    """A small repository that looks like this one."""
    for name in ("hope_train/a.py", "launch/b.py", "launch/job.sh.j2", "data_pipelines/c.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n")
    (folder / "pyproject.toml").write_text("")
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    return folder


def test_a_snapshot_is_the_code_as_it_is_now(tmp_path: Path) -> None:
    root = repository(tmp_path / "repository")
    clean = take_snapshot(tmp_path / "code", root)
    assert clean.facts["changed"] is False
    (root / "hope_train" / "a.py").write_text("changed = 1\n")
    (root / "launch" / "new.py").write_text("")
    changed = take_snapshot(tmp_path / "code", root)
    assert changed.folder != clean.folder
    assert changed.folder is not None
    assert clean.folder is not None
    assert (changed.folder / "hope_train" / "a.py").read_text() == "changed = 1\n"
    assert (changed.folder / "launch" / "new.py").is_file()
    assert "+changed = 1" in (changed.folder / "changes.diff").read_text()
    assert (clean.folder / "hope_train" / "a.py").read_text() == "# hope_train/a.py\n"
    assert take_snapshot(tmp_path / "code", root).folder == changed.folder


def test_an_installed_version_is_only_named(tmp_path: Path) -> None:
    assert take_snapshot(tmp_path / "code", tmp_path).folder is None


def program(folder: Path, name: str, text: str) -> None:
    """A program of this name on the PATH: what a cluster in trouble looks like from a login node."""
    file = folder / name
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sleep 30", "does not answer"),
        ("echo 'squeue: error: Unable to contact slurm controller (connect failure)' >&2; exit 1", "does not answer"),
        ("echo 'squeue: error: Invalid user' >&2; exit 1", "Slurm refuses .squeue.: Invalid user"),
    ],
)
def test_a_slurm_in_trouble_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    program(tmp_path, "squeue", text)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(SlurmError, match=said) as raised:
        Slurm(timeout_s=0.5).queue(["1"])
    assert "\n" not in str(raised.value)


def test_no_slurm_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="not on this machine's PATH"):
        Slurm().job("1")
