"""What the world does to a run: arguments, stale launch variables, foreign knobs, other nodes, consoles that go away.

The program runs as a process wherever the process is what matters. A setting that is dropped, a launch that waits for
nobody, or a console that takes the run with it costs eight GPUs for ten minutes, and often nobody notices.
"""
import array
import fcntl
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import config, trainer
from test_process import FOREVER, ONE_PASS, ROOT, RULER, STEP, Ended, Lab, Live, environment, kill, together

tg = trainer()
KNOBS = {f.name.upper() for f in tg.dataclasses.fields(tg.Config)}
# the whole job in the fewest seconds: one pass, nothing to calibrate
QUICK = dict(ITERATIONS=2, VAL_DOCS=1, QUANTIZER="rtn", STEP_RULE="sdclip", TRAIN_BATCH_SCHEDULE="", **ONE_PASS)
SOON = 45  # seconds of a busy machine for what takes three: imports, and then a refusal
LIMIT = 60  # seconds after which a process is killed that should have ended long ago


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("world"))


class Told(NamedTuple):
    """A process that has ended: status, both streams, seconds, and the names that lie in its folder."""
    code: int
    out: str
    err: str
    seconds: float
    names: set

    @property
    def said(self) -> str:
        return self.out + self.err


def settings(lab, **changes):
    return lab.small(**{**QUICK, **changes})


def ask(lab, name, *arguments, **knobs):
    """The program with arguments, in a folder of its own; a knob whose value is None is not set at all."""
    folder, began = lab.root / name, time.monotonic()
    folder.mkdir()
    env = environment({k: v for k, v in settings(lab, **knobs).items() if v is not None})
    process = subprocess.Popen([sys.executable, str(lab.program), *arguments], cwd=folder, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    guard = threading.Timer(LIMIT, kill, [process.pid])
    guard.start()
    out, err = process.communicate()
    guard.cancel()
    return Told(process.returncode, out, err, time.monotonic() - began, {p.name for p in folder.iterdir()})


def last_launch(path: Path) -> str:
    """What the newest launch wrote into a log that may hold several: all that stands behind the last ruler."""
    return path.read_text(encoding="utf-8").rpartition(f"\n{RULER}\n")[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Seen(dict):
    """What jobs gave. One that went wrong is raised where it is asked for, and fails no other test."""

    def __getitem__(self, name):
        value = super().__getitem__(name)
        if isinstance(value, BaseException):
            raise value
        return value


def caught(job):
    try:
        return job()
    except BaseException as e:
        return e


@pytest.fixture(scope="module")
def world(lab):
    """All processes but the nodes, two at a time; the longest ones begin."""
    jobs = {"run after run": lambda: run_after_run(lab), "apostrophes": lambda: run_with_apostrophes(lab),
            "waiting": lambda: wait_for_nobody(lab), "head": lambda: run_to_head(lab),
            "folder in a name": lambda: ask(lab, "asked_folder", RUN_ID="exp/seed42")}
    jobs |= {args: lambda i=i, args=args: ask(lab, f"asked_{i}", *args) for i, args in enumerate([*HELP, *ARGUMENTS])}
    jobs |= {name: lambda name=name: ask(lab, name.replace(" ", "_"), **LAUNCHES[name][0]) for name in LAUNCHES}
    return Seen(together({name: lambda job=job: caught(job) for name, job in jobs.items()}))


# ----------------------------------------------------------------------------------------------------------------------
# The command line, and what a launcher left in the environment
# ----------------------------------------------------------------------------------------------------------------------
HELP = [("--help",), ("-h",)]
ARGUMENTS = {("--seed", "42"): "SEED=42", ("--seed=42",): "SEED=42", ("SEED=42",): "SEED=42", ("seed=42",): "SEED=42",
             ("--model-dim=64", "--seed=42"): "MODEL_DIM=64 SEED=42"}
GROUP = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=29999)
# variables -> the names of which one at least must be in the message
LAUNCHES = {
    "a rank alone": (dict(RANK=1), {"RANK"}),
    "a number of ranks alone": (dict(WORLD_SIZE=2), {"WORLD_SIZE", "RANK"}),
    "a rank that is none": (dict(RANK=2, LOCAL_RANK=0, WORLD_SIZE=2, **GROUP), {"RANK"}),
    "nobody to meet": (dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2), {"MASTER_ADDR"}),
}


@pytest.fixture(scope="module")
def asked(world):
    """What must be refused or answered at once."""
    return world


@pytest.mark.parametrize("args", HELP, ids=" ".join)
def test_help_helps(asked, args):
    told = asked[args]
    assert told.code == 0, told.said
    assert re.search(r"\bpython3? \S*train_gpt\.py", told.out), "help goes to stdout"
    for mode in ("eval", "pack", "sample", "config"):
        assert re.search(rf"\b{mode}\b", told.out), mode
    assert re.search(r"^.*\b[A-Z][A-Z0-9_]+=\S+.* python3? \S*train_gpt\.py", told.out, re.M), "how a knob is set"
    assert not STEP.search(told.said) and "run_id:" not in told.said, "nothing is run"
    assert not told.names, "nothing is made"


@pytest.mark.parametrize("args", ARGUMENTS, ids=" ".join)
def test_arguments_are_refused_with_the_right_spelling(asked, args):
    told = asked[args]
    assert told.code == 1, told.said
    assert re.search(r"\bconfig: ", told.said) and "Traceback" not in told.said, told.said
    assert re.search(rf"\b{ARGUMENTS[args]} python3? \S*train_gpt\.py", told.said), told.said
    assert not STEP.search(told.said) and not told.names


@pytest.mark.parametrize("name", LAUNCHES)
def test_an_impossible_launch_is_refused(asked, name):
    told, (_, named) = asked[name], LAUNCHES[name]
    assert told.code == 1 and told.seconds < SOON, told
    assert "Traceback" not in told.said, told.said
    assert any(re.search(rf"\b{n}\b", told.said) for n in named), told.said
    assert re.search("unset|torchrun", told.said), "what to do about it"
    assert not STEP.search(told.said) and not told.names, told


@pytest.mark.parametrize("env", [dict(RANK="3"), dict(RANK="1", WORLD_SIZE="1"), dict(WORLD_SIZE="8"),
                                 dict(RANK="0", WORLD_SIZE="8", MASTER_ADDR="127.0.0.1"),
                                 dict(RANK="8", WORLD_SIZE="8", MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")], ids=str)
def test_more_launches_that_cannot_be(env):
    with pytest.raises(tg.ConfigError) as refused:
        tg.launch(env)
    text = str(refused.value)
    assert re.search("RANK|WORLD_SIZE|MASTER_PORT", text) and re.search("unset|torchrun", text), text


def test_launches_that_can_be():
    assert tg.launch({}) == tg.launch(dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")) == (0, 0, 1)
    group = dict(WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
    assert tg.launch(dict(group, RANK="3", LOCAL_RANK="1")) == (3, 1, 4)


def wait_for_nobody(lab):
    """One rank of two, whose peer never comes: output, seconds to its complaint, seconds behind SIGTERM, status."""
    env = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    live = lab.start("alone", settings(lab, **env), run_id="alone")
    lines = live.lines

    def read():
        for line in live.process.stdout:
            lines.append(line)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while "waiting for" not in "".join(lines) and live.process.poll() is None and time.monotonic() - live.began < 20:
        time.sleep(0.05)
    spoke, sent = time.monotonic() - live.began, time.monotonic()
    live.send(signal.SIGTERM)
    try:
        code = live.process.wait(10)
    except subprocess.TimeoutExpired:
        code = None
        kill(live.process.pid)
    took = time.monotonic() - sent
    reader.join(10)
    live.guard.cancel()
    return "".join(lines), spoke, took, code


def test_a_rank_says_for_whom_it_waits(asked):
    out, spoke, _, _ = asked["waiting"]
    assert spoke < 20, out
    assert re.search(r"^.*waiting for.*$", out, re.M) and re.search(r"^(?=.*waiting for).*\b2\b", out, re.M), out


def test_a_rank_that_waits_can_be_ended(asked):
    out, _, took, code = asked["waiting"]
    assert code in (128 + signal.SIGTERM, -signal.SIGTERM), f"{code} after {took:.1f}s\n{out}"


# ----------------------------------------------------------------------------------------------------------------------
# Names of runs
# ----------------------------------------------------------------------------------------------------------------------
def test_a_run_id_with_a_folder_in_it_is_refused(asked):
    told = asked["folder in a name"]
    assert told.code == 1 and "Traceback" not in told.said, told.said
    assert re.search(r"\bconfig: .*RUN_ID", told.said) and not STEP.search(told.said) and not told.names


@pytest.mark.parametrize("run_id", ["exp/seed42", "..", ".", "a b/c", ".hidden", " ", "\t", "/abs", "a\nb"])
def test_a_run_id_is_a_file_name(run_id):
    with pytest.raises(tg.ConfigError, match="RUN_ID"):
        config(RUN_ID=run_id)


@pytest.mark.parametrize("run_id", ["", "a b", "seed42", "2026-11-28_exp.v2", "it's", "größer"])
def test_other_run_ids_are_nobodys_business(run_id):
    assert config(RUN_ID=run_id).run_id == run_id


# ----------------------------------------------------------------------------------------------------------------------
# Names of other scripts
# ----------------------------------------------------------------------------------------------------------------------
FOREIGN = [line for line in (ROOT / "tests" / "foreign_names.tsv").read_text().splitlines() if line[0] != "#"]
# in the commands of records, though fewer scripts read them, and what some of them are called here
MORE = """RECUR_LAYERS RECUR_START_STEP DATA_DIR TOKEN_BOOST WITHIN_BOOST WORD_BOOST AGREE_ADD_BOOST TOKEN_ORDER
          TOKEN_THRESHOLD AWQ_LITE_ENABLED FUSED_CE_ENABLED GRAD_ACCUM_STEPS LORA_RANK MLP_HIDDEN MIXED_QUANT
          CASEOPS_ENABLED LATE_QAT PPM_LLO PREQUANT_TTT_ENABLED INT6_LAYER_END N_INT6_LAYERS""".split()
HERE = {"DATA_DIR": "DATA_PATH", "RECUR_LAYERS": "LOOP_START", "RECUR_START_STEP": "ENABLE_LOOPING_AT",
        "LORA_RANK": "TTT_LORA_RANK", "TOKEN_BOOST": "NGRAM_TILT_BOOST", "TOKEN_ORDER": "NGRAM_TILT_ORDER",
        "TOKEN_THRESHOLD": "NGRAM_TILT_THRESHOLD", "GRAD_ACCUM_STEPS": "MICRO_BATCH_TOKENS", "MLP_HIDDEN": "MLP_MULT"}
# near by letters, far by meaning
MISLEADING = {"CASEOPS_ENABLED": "TTT_ENABLED", "LATE_QAT": "DATA_PATH", "PPM_LLO": "NUM_LOOPS",
              "INT6_LAYER_END": "NUM_LAYERS", "N_INT6_LAYERS": "NUM_LAYERS", "PREQUANT_TTT_ENABLED": "TTT_ENABLED",
              "AWQ_LITE_ENABLED": "TTT_ENABLED"}
STRANGERS = sorted({*FOREIGN, *MORE} - KNOBS)


def refusal(**env) -> str:
    with pytest.raises(tg.ConfigError) as refused:
        config(**env)
    return str(refused.value)


def test_every_foreign_name_stops_a_run_and_is_answered():
    """With what it is called here, or with the word that there is no such thing here."""
    ignored, unanswered = [], []
    for name in STRANGERS:
        try:
            config(**{name: "1"})
            ignored.append(name)
        except tg.ConfigError as e:
            line = next((x for x in str(e).splitlines() if re.search(rf"\b{name}\b", x)), "")
            rest = set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", line)) - {name}
            if not line or not (rest & KNOBS or re.search(r"\b(no|not|nothing|never|without|always|once)\b", line)):
                unanswered.append(str(e))
    assert not ignored, f"{len(ignored)} of {len(STRANGERS)} are silently ignored: {' '.join(ignored)}"
    assert not unanswered, f"{len(unanswered)} are refused without an answer: {unanswered[:5]}"


@pytest.mark.parametrize("name", HERE)
def test_a_foreign_name_is_translated(name):
    assert re.search(rf"\b{HERE[name]}\b", refusal(**{name: 1}))


@pytest.mark.parametrize("name", MISLEADING)
def test_the_nearest_by_letters_is_not_suggested(name):
    text = refusal(**{name: 1})
    assert not re.search(rf"(did you mean|is called) {MISLEADING[name]}\b", text), text


def test_caseops_is_a_property_of_the_data():
    assert re.search(r"\bdata\b|DATA_PATH|data set", refusal(CASEOPS_ENABLED=1)), refusal(CASEOPS_ENABLED=1)


def test_all_unknown_names_are_told_at_once_a_line_each():
    """The command of the 1.0611 record has 44 settings: one name a start would take a dozen starts."""
    names = ["CASEOPS_ENABLED", "DATA_DIR", "FUSED_CE_ENABLED", "GATED_ATTENTION", "QAT_ENABLED", "TTT_LERNING_RATE"]
    lines = refusal(**dict.fromkeys(names, 1)).splitlines()
    for name in names:
        about = [line for line in lines if re.search(rf"\b{name}\b", line)]
        assert len(about) == 1, (name, lines)
        assert not [n for n in names if n != name and re.search(rf"\b{n}\b", about[0])], about


SHELL = """
    PATH HOME LANG LANGUAGE LC_ALL LC_CTYPE LC_TIME LC_NUMERIC LC_MESSAGES LC_MONETARY SHELL TERM TERM_PROGRAM
    COLORTERM USER USERNAME LOGNAME MAIL PWD OLDPWD SHLVL _ DISPLAY WAYLAND_DISPLAY WINDOWID HOSTNAME HOSTTYPE HOST
    MACHTYPE OSTYPE TMPDIR TMP TEMP EDITOR VISUAL PAGER LESS LESSOPEN LESSCLOSE LS_COLORS LSCOLORS PS1 PS2
    PROMPT_COMMAND HISTSIZE HISTFILE HISTCONTROL TZ SSH_CLIENT SSH_CONNECTION SSH_TTY SSH_AUTH_SOCK SSH_AGENT_PID
    GPG_TTY TMUX TMUX_PANE STY SUDO_USER SUDO_COMMAND CONDA_EXE CONDA_PREFIX CONDA_PREFIX_1 CONDA_DEFAULT_ENV
    CONDA_PYTHON_EXE CONDA_SHLVL CONDA_PROMPT_MODIFIER _CE_CONDA _CE_M VIRTUAL_ENV VIRTUAL_ENV_PROMPT PYENV_ROOT
    PYENV_VERSION PYENV_SHELL PYENV_HOOK_PATH PYENV_DIR UV_CACHE_DIR UV_PYTHON UV PIP_CACHE_DIR PIP_INDEX_URL
    PIP_NO_CACHE_DIR POETRY_HOME PIPENV_ACTIVE PYTHONPATH PYTHONHOME PYTHONUNBUFFERED PYTHONDONTWRITEBYTECODE
    PYTHONHASHSEED PYTHONIOENCODING PYTHONUTF8 PYTHONWARNINGS PYTHONSTARTUP PYTHONFAULTHANDLER PYTHON_VERSION
    PYTHON_SHA256 PYTHON_PIP_VERSION PYTHONBREAKPOINT PYTHONSAFEPATH PYTEST_CURRENT_TEST PYTEST_XDIST_WORKER
    PYTEST_XDIST_WORKER_COUNT PYTEST_ADDOPTS PYTEST_VERSION COVERAGE_FILE OMP_NUM_THREADS OMP_PROC_BIND OMP_PLACES
    OMP_SCHEDULE OMP_DYNAMIC KMP_AFFINITY KMP_BLOCKTIME KMP_DUPLICATE_LIB_OK GOMP_CPU_AFFINITY GOMP_SPINCOUNT
    MKL_NUM_THREADS MKL_THREADING_LAYER MKL_DYNAMIC OPENBLAS_NUM_THREADS BLIS_NUM_THREADS NUMEXPR_NUM_THREADS
    NUMEXPR_MAX_THREADS VECLIB_MAXIMUM_THREADS NUMBA_NUM_THREADS TBB_NUM_THREADS MALLOC_ARENA_MAX
    MALLOC_TRIM_THRESHOLD_ LD_LIBRARY_PATH LD_PRELOAD LIBRARY_PATH CPATH C_INCLUDE_PATH CPLUS_INCLUDE_PATH
    DYLD_LIBRARY_PATH PKG_CONFIG_PATH CMAKE_PREFIX_PATH CC CXX CFLAGS CXXFLAGS LDFLAGS MAKEFLAGS MAX_JOBS
    CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_PATH CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING CUDA_DEVICE_MAX_CONNECTIONS
    CUDA_MODULE_LOADING CUDA_CACHE_PATH CUDA_VERSION CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY CUDNN_VERSION
    CUBLAS_WORKSPACE_CONFIG NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NVIDIA_REQUIRE_CUDA
    NVIDIA_PRODUCT_NAME NVIDIA_TF32_OVERRIDE NVIDIA_BUILD_ID NVIDIA_PYTORCH_VERSION NV_CUDA_LIB_VERSION
    NV_CUDNN_VERSION NV_CUDNN_PACKAGE NV_LIBNCCL_PACKAGE NV_LIBCUBLAS_VERSION NV_NVTX_VERSION NVARCH
    NVCC_APPEND_FLAGS ROCM_PATH HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES HSA_OVERRIDE_GFX_VERSION NCCL_DEBUG
    NCCL_DEBUG_SUBSYS NCCL_SOCKET_IFNAME NCCL_IB_DISABLE NCCL_IB_HCA NCCL_P2P_DISABLE NCCL_P2P_LEVEL
    NCCL_SHM_DISABLE NCCL_NVLS_ENABLE NCCL_CUMEM_ENABLE NCCL_TIMEOUT NCCL_ASYNC_ERROR_HANDLING NCCL_TOPO_FILE
    NCCL_NET GLOO_SOCKET_IFNAME UCX_TLS UCX_NET_DEVICES FI_PROVIDER FI_EFA_USE_DEVICE_RDMA
    TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_AVOID_RECORD_STREAMS TORCH_NCCL_ENABLE_MONITORING
    TORCH_NCCL_BLOCKING_WAIT TORCH_DISTRIBUTED_DEBUG TORCH_CPP_LOG_LEVEL TORCH_SHOW_CPP_STACKTRACES TORCH_LOGS
    TORCH_TRACE TORCH_HOME TORCH_CUDA_ARCH_LIST TORCH_EXTENSIONS_DIR TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
    TORCH_COMPILE_DEBUG TORCHINDUCTOR_CACHE_DIR TORCHINDUCTOR_FX_GRAPH_CACHE TORCHINDUCTOR_COMPILE_THREADS
    TORCHINDUCTOR_MAX_AUTOTUNE TORCHDYNAMO_DISABLE TORCHDYNAMO_VERBOSE TORCHELASTIC_RUN_ID
    TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE
    TORCHELASTIC_SIGNALS_TO_HANDLE PYTORCH_VERSION PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF
    PYTORCH_NO_CUDA_MEMORY_CACHING PYTORCH_NVML_BASED_CUDA_CHECK PYTORCH_TUNABLEOP_ENABLED PYTORCH_KERNEL_CACHE_PATH
    TRITON_CACHE_DIR TRITON_INTERPRET TRITON_PTXAS_PATH TRITON_PRINT_AUTOTUNING XLA_FLAGS TF_CPP_MIN_LOG_LEVEL
    TF_ENABLE_ONEDNN_OPTS JAX_PLATFORMS TOKENIZERS_PARALLELISM LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE
    ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT NODE_RANK NNODES NPROC_PER_NODE OMPI_COMM_WORLD_RANK
    OMPI_COMM_WORLD_SIZE OMPI_MCA_btl PMI_RANK PMI_SIZE PMIX_RANK MPI_LOCALRANKID SLURM_JOB_ID SLURM_JOBID
    SLURM_PROCID SLURM_LOCALID SLURM_NTASKS SLURM_NODEID SLURM_NNODES SLURM_NODELIST SLURM_JOB_NAME
    SLURM_JOB_PARTITION SLURM_CPUS_PER_TASK SLURM_GPUS_ON_NODE SLURM_GPUS SLURM_MEM_PER_NODE SLURM_SUBMIT_DIR
    SLURM_TMPDIR SLURM_ARRAY_TASK_ID SLURM_STEP_ID SLURMD_NODENAME SBATCH_ACCOUNT PBS_JOBID PBS_NODEFILE LSB_JOBID
    JOB_ID SGE_TASK_ID HF_HOME HF_TOKEN HF_HUB_OFFLINE HF_HUB_CACHE HF_DATASETS_CACHE HF_ENDPOINT
    HF_HUB_ENABLE_HF_TRANSFER HF_HUB_DISABLE_PROGRESS_BARS HF_DATASETS_OFFLINE HUGGING_FACE_HUB_TOKEN
    HUGGINGFACE_HUB_CACHE TRANSFORMERS_CACHE TRANSFORMERS_OFFLINE TRANSFORMERS_VERBOSITY DATASETS_VERBOSITY
    WANDB_API_KEY WANDB_MODE WANDB_PROJECT WANDB_ENTITY WANDB_DIR WANDB_DISABLED WANDB_NAME WANDB_RUN_ID
    WANDB_SILENT COMET_API_KEY MLFLOW_TRACKING_URI NEPTUNE_API_TOKEN CLEARML_WEB_HOST TENSORBOARD_PORT
    OPENAI_API_KEY ANTHROPIC_API_KEY GITHUB_TOKEN GH_TOKEN KAGGLE_USERNAME GITHUB_ACTIONS GITHUB_WORKSPACE
    GITHUB_REF GITHUB_SHA CI RUNNER_OS GITLAB_CI JENKINS_URL BUILD_NUMBER XDG_RUNTIME_DIR XDG_SESSION_ID
    XDG_SESSION_TYPE XDG_DATA_DIRS XDG_CONFIG_HOME XDG_CACHE_HOME XDG_CURRENT_DESKTOP DBUS_SESSION_BUS_ADDRESS
    DESKTOP_SESSION GNOME_TERMINAL_SCREEN GTK_MODULES QT_ACCESSIBILITY VTE_VERSION INVOCATION_ID JOURNAL_STREAM
    SYSTEMD_EXEC_PID NOTIFY_SOCKET AWS_REGION AWS_DEFAULT_REGION AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
    AWS_SESSION_TOKEN AWS_PROFILE AWS_BATCH_JOB_ID ECS_CONTAINER_METADATA_URI GOOGLE_APPLICATION_CREDENTIALS
    GOOGLE_CLOUD_PROJECT CLOUDSDK_CONFIG AZURE_CLIENT_ID AZUREML_RUN_ID SM_NUM_GPUS SM_CHANNEL_TRAINING SM_MODEL_DIR
    KUBERNETES_SERVICE_HOST KUBERNETES_SERVICE_PORT KUBERNETES_PORT_443_TCP_ADDR KUBECONFIG POD_NAME POD_IP
    NODE_NAME DOCKER_HOST container RUNPOD_POD_ID RUNPOD_API_KEY RUNPOD_GPU_COUNT RUNPOD_CPU_COUNT RUNPOD_PUBLIC_IP
    RUNPOD_TCP_PORT_22 RUNPOD_MEM_GB RUNPOD_DC_ID PUBLIC_KEY VAST_CONTAINERLABEL VAST_TCP_PORT_22
    LAMBDA_CLOUD_API_KEY MODAL_TASK_ID MODAL_ENVIRONMENT COLAB_GPU COLAB_RELEASE_TAG KAGGLE_KERNEL_RUN_TYPE
    JUPYTER_PASSWORD JUPYTER_TOKEN JUPYTER_PORT JUPYTER_SERVER_ROOT JPY_PARENT_PID JPY_SESSION_NAME IPYTHONDIR
    MPLBACKEND MPLCONFIGDIR VSCODE_IPC_HOOK_CLI VSCODE_GIT_ASKPASS_MAIN VSCODE_CWD VSCODE_PID VSCODE_INJECTION
    CURSOR_TRACE_ID BROWSER ELECTRON_RUN_AS_NODE GIT_EDITOR GIT_PAGER GIT_ASKPASS GIT_SSH_COMMAND GIT_DIR
    GIT_AUTHOR_NAME GIT_AUTHOR_EMAIL GIT_COMMITTER_NAME GIT_TERMINAL_PROMPT GIT_PS1_SHOWDIRTYSTATE http_proxy
    https_proxy no_proxy all_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY SSL_CERT_FILE SSL_CERT_DIR
    REQUESTS_CA_BUNDLE CURL_CA_BUNDLE DEBIAN_FRONTEND NODE_PATH NODE_OPTIONS NODE_VERSION NVM_DIR NPM_CONFIG_PREFIX
    JAVA_HOME GOPATH GOROOT CARGO_HOME RUSTUP_HOME GEM_HOME RBENV_ROOT MODULEPATH MODULESHOME LOADEDMODULES LMOD_CMD
    LMOD_DIR MANPATH INFOPATH BASH_ENV BASH_FUNC_module%% BASHOPTS ZDOTDIR ZSH FPATH STARSHIP_SHELL MODEL SPEED DATA
    DATASET DATASETS_PATH NAME ID OUTPUT OUTPUT_DIR LOG LOG_DIR LOGS VERBOSE DEBUG PORT VERSION PROJECT EXPERIMENT
    NUM_GPUS NGPUS NPROC WORKSPACE WORK SCRATCH STORAGE REPO TOKEN CONFIG STAGE TAG NOTES
""".split()


def test_the_list_of_shell_variables_is_one():
    assert len(SHELL) > 400 and len(set(SHELL)) == len(SHELL)
    assert not set(SHELL) & KNOBS and not set(SHELL) & set(FOREIGN), "then the two lists contradict each other"


def test_what_a_shell_a_container_or_a_cluster_sets_never_stops_a_run():
    stopped = {}
    for name in SHELL:
        try:
            config(**{name: "1"})
        except SystemExit as e:
            stopped[name] = str(e)
    assert not stopped, stopped
    assert config(**dict.fromkeys(SHELL, "1")) == config()


# ----------------------------------------------------------------------------------------------------------------------
# Consoles that go away, signals, names in use: several runs, each of which takes the name of the one before
# ----------------------------------------------------------------------------------------------------------------------
def script(lab, name, text, run_id, outer=(), **knobs):
    """A bash script in which <run> is the program. `outer`: what its own environment holds besides the knobs."""
    env = {**settings(lab, **knobs), "RUN_ID": run_id, **dict(outer)}
    text = text.replace("<run>", shlex.join([sys.executable, str(lab.program)]))
    return Live(lab.root / name, run_id, ["bash", "-c", text], environment(env)).end()


def ahead_of_the_console(log, read_end):
    """Read the console up to the third step and no farther; True once the log holds more than was ever printed."""
    text = b""
    while not re.search(rb"^step:3/.*\n", text, re.M):
        byte = os.read(read_end, 1)
        if not byte:
            return False
        text += byte
    seen, until = len(text) - text.index(b"step:3/"), time.monotonic() + 8
    while time.monotonic() < until:
        logged = log.read_bytes().rpartition(f"\n{RULER}\n".encode())[2]
        written = len(logged) - logged.index(b"step:3/")  # from here on both get the same lines
        waiting = array.array("i", [0])
        fcntl.ioctl(read_end, termios.FIONREAD, waiting)  # asked after the log: what was printed first is in it
        if written > seen + waiting[0]:
            return True
        time.sleep(0.02)
    return False


def with_a_console_of_one_page(lab, name, knobs, seen):
    """A run whose reader stalls, so that it waits in the middle of printing; then it is hung up; `seen` gets all."""
    folder, (read_end, write_end) = lab.root / name, os.pipe()
    folder.mkdir()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    command = [sys.executable, str(lab.program)]
    process = subprocess.Popen(command, cwd=folder, stdout=write_end, stderr=subprocess.STDOUT,
                               env=environment({**knobs, "RUN_ID": name}))
    guard = threading.Timer(LIMIT, kill, [process.pid])
    guard.start()
    os.close(write_end)
    log = folder / "logs" / f"{name}.txt"
    try:
        seen["log first"] = ahead_of_the_console(log, read_end)
        seen["second"] = ask_again(lab, name, folder)
        reader = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(read_end, 65536), b"")])
        reader.start()
        process.send_signal(signal.SIGHUP)
        seen["hangup"] = process.wait(30)
        reader.join(30)
    finally:
        kill(process.pid)
        process.wait()
        guard.cancel()
        os.close(read_end)
    seen["hangup log"] = last_launch(log)


def ask_again(lab, run_id, folder):
    """Another run of that name in that folder."""
    env = environment(settings(lab, RUN_ID=run_id))
    process = subprocess.run([sys.executable, str(lab.program)], cwd=folder, env=env, text=True, capture_output=True,
                             timeout=LIMIT)
    return Told(process.returncode, process.stdout, process.stderr, 0.0, set())


def run_after_run(lab):
    """One name, again and again: hung up, terminated, killed, and at last to its end without a console."""
    seen, forever = {}, lab.small(**FOREVER)
    with_a_console_of_one_page(lab, "twin", forever, seen)
    live = lab.start("twin", forever)
    live.wait_for("step:2/")
    live.send(signal.SIGTERM)
    seen["term"] = live.end()
    seen["term log"] = last_launch(seen["term"].path(".txt"))
    # as nohup does it: the signal is ignored from the start
    nohup = ["bash", "-c", "trap '' HUP; exec " + shlex.join([sys.executable, str(lab.program)])]
    live = Live(lab.root / "twin", "twin", nohup, environment({**forever, "RUN_ID": "twin"}))
    live.wait_for("step:2/")
    live.send(signal.SIGHUP)
    live.wait_for("step:40/")
    live.send(signal.SIGKILL)
    seen["kill"] = live.end()
    seen["closed"] = script(lab, "twin", "<run> >&-; exit $?", "twin", outer={"FOO_WIDTH": 3})
    seen["closed log"] = last_launch(seen["closed"].path(".txt"))
    return seen


# what stands between a shell and a program sets variables of its own: shims, environments, schedulers, notebooks
BETWEEN = """PYENV_VERSION PYENV_DIR PYENV_HOOK_PATH UV_RUN_RECURSION_DEPTH CONDA_PREFIX VIRTUAL_ENV POETRY_ACTIVE
             PIPENV_ACTIVE TOX_ENV_NAME SUDO_USER SUDO_COMMAND INVOCATION_ID JOURNAL_STREAM SYSTEMD_EXEC_PID
             JPY_PARENT_PID CLICOLOR MAKELEVEL MAKEFLAGS DIRENV_DIR VSCODE_PID SLURM_PROCID LMOD_CMD""".split()


def run_to_head(lab):
    """A run whose reader goes away after three lines; one of the variables that were set for it is nobody's."""
    known = "TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 " + " ".join(f"{name}=1" for name in BETWEEN)
    ended = script(lab, "head", f"FOO_WIDTH=3 {known} <run> | head -3; exit ${{PIPESTATUS[0]}}", "head")
    return {"head": ended, "head log": last_launch(ended.path(".txt"))}


@pytest.fixture(scope="module")
def console(world):
    """Runs that lost their console, their terminal or their life."""
    return world["run after run"] | world["head"]


@pytest.mark.parametrize("name", ["head", "closed"])
def test_a_run_outlives_its_console(console, name):
    ended, log = console[name], console[name + " log"]
    assert ended.code == 0, ended.out
    assert log.splitlines()[-1].startswith("verdict: "), log[-2000:]
    assert len(re.findall(r"^.*\bconsole\b.*$", log, re.M)) == 1, "that, and nothing more, is said about it"
    assert "BrokenPipe" not in ended.out and "Traceback" not in ended.out + log, ended.out


def test_the_log_has_every_line_before_the_console(console):
    """A console that stalls must not keep from the file what happened meanwhile."""
    assert console["log first"]


def test_a_hangup_is_told_with_what_to_do(console):
    assert console["hangup"] in (128 + signal.SIGHUP, -signal.SIGHUP)
    log = console["hangup log"]
    assert "SIGHUP" in log and re.search("nohup|tmux", log) and "verdict: " not in log, log[-1500:]


def test_a_hangup_does_nothing_under_nohup(console):
    ended = console["kill"]
    assert ended.code == -signal.SIGKILL and re.search("^step:40/", ended.out, re.M), ended.out


def test_a_termination_is_told(console):
    ended, log = console["term"], console["term log"]
    assert ended.code in (128 + signal.SIGTERM, -signal.SIGTERM), ended.out
    assert "SIGTERM" in log and "verdict: " not in log, log[-1500:]


def test_a_name_in_use_is_refused(console):
    told = console["second"]
    assert told.code == 1 and re.search(r"\bin use\b", told.said) and "twin" in told.said, told.said
    assert not STEP.search(told.said) and "Traceback" not in told.said, told.said
    assert console["hangup log"].count("run_id:twin ") == 1, "nothing of the second run is in the first one's log"


def test_a_name_is_free_after_any_end(console):
    """After SIGHUP, SIGTERM and SIGKILL: each of these runs took the name of the one before."""
    assert console["term"].out.count("step:2/") == 1 and console["kill"].code == -signal.SIGKILL, console["kill"].out
    assert console["closed"].code == 0, console["closed"].out


def loud(log):
    return [line for line in log.splitlines() if line.startswith("!! ")]


def test_a_variable_that_was_set_for_this_run_and_is_no_knob_is_told(console):
    lines = loud(console["head log"])
    assert len([line for line in lines if "FOO_WIDTH" in line]) == 1, lines
    known = "TOKENIZERS_PARALLELISM|PYTHONUNBUFFERED|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|PATH"
    assert not [line for line in lines if re.search(rf"\b({known})\b", line)], "libraries and the shell know these"


def test_variables_of_what_started_the_program_are_not(console):
    """Whoever starts Python by pyenv's shim would be warned in every run, and soon read no warning any more."""
    told = {name for line in loud(console["head log"]) for name in re.findall(r"\b[A-Z][A-Z0-9_]+\b", line)}
    assert not told & set(BETWEEN), told & set(BETWEEN)


def test_an_inherited_variable_is_not(console):
    assert not [line for line in loud(console["closed log"]) if "FOO_WIDTH" in line]


# ----------------------------------------------------------------------------------------------------------------------
# Commands that the program prints
# ----------------------------------------------------------------------------------------------------------------------
PATHS = ("DATA_PATH", "TOKENIZER_PATH", "ARTIFACT", "CHECKPOINT", "ARTIFACT_DIR")


def printed_commands(log):
    """Every shell command of a log: behind `goes on with: `, or from an assignment or `python` to the line's end."""
    found = []
    for line in log.splitlines():
        if re.match(r"[* ] [A-Z][A-Z0-9_]*=|not the record's default", line):  # the list of knobs is no command
            continue
        if line.startswith("goes on with: "):
            found.append(line.removeprefix("goes on with: "))
        elif re.search(r"\bMODE=\w+ |\bpython3? \S*\.py\b|\bpython3? ['\"/]", line):
            found.append(line[re.search(r"\b(cd |[A-Z][A-Z0-9_]*=|python3? )", line).start():])
    return found


def run_with_apostrophes(lab):
    """A run with a space and an apostrophe in all its paths, and what the last command of its log does."""
    folder, data, code = (lab.root / f"a user's {what}" for what in ("run", "data", "code"))
    shutil.copytree(lab.root / "corpus", data)
    shutil.copytree(lab.program.parent, code)
    logs, name = "my logs, don't delete", "it's me"
    knobs = settings(lab, DATA_PATH=data / "datasets" / lab.shards.name, ARTIFACT_DIR=logs, RUN_ID=name,
                     TOKENIZER_PATH=data / "tokenizers" / Path(lab.data["TOKENIZER_PATH"]).name)
    ended = Live(folder, name, [sys.executable, str(code / lab.program.name)], environment(knobs)).end()
    commands = printed_commands(last_launch(folder / logs / f"{name}.txt"))
    again = None
    if commands:
        again = Live(folder, "again", ["bash", "-c", commands[-1]], environment(dict(PATH=path_with_python(lab)))).end()
    return folder, ended, commands, again


@pytest.fixture(scope="module")
def apostrophe(world):
    return world["apostrophes"]


def path_with_python(lab):
    """A PATH on which `python` is the one that runs the tests."""
    folder = lab.root / "bin"
    folder.mkdir(exist_ok=True)
    for name in ("python", "python3"):
        (folder / name).write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} \"$@\"\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_printed_commands_can_be_pasted(apostrophe):
    folder, ended, commands, _ = apostrophe
    assert ended.code == 0, ended.out
    assert len(commands) >= 2, "one with the checkpoint, one with the artifact"
    for command in commands:
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, (command, checked.stderr)
        words = shlex.split(command)
        scripts = [w for w in words if w.endswith(".py")]
        assert scripts and all((folder / w).is_file() for w in scripts), command
        places = dict(w.split("=", 1) for w in words if w.split("=", 1)[0] in PATHS and "=" in w)
        assert all((folder / p).exists() for p in places.values()), (command, places)
    assert any("CHECKPOINT" in c or "MODE=pack" in c for c in commands) and "MODE=eval" in commands[-1], commands


def test_a_pasted_command_does_what_it_says(apostrophe):
    _, ended, _, again = apostrophe
    assert again is not None, "no command was printed"
    assert again.code == 0, again.out
    result = re.compile(r"^val_bpb:(\d\.\d+)", re.M)
    assert result.findall(again.out) == result.findall(ended.out) != []


# ----------------------------------------------------------------------------------------------------------------------
# Nodes that share nothing but a network
# ----------------------------------------------------------------------------------------------------------------------
class Nodes(NamedTuple):
    """What two nodes said and how they ended."""
    first: Ended
    second: Ended

    @property
    def said(self) -> str:
        return self.first.out + self.second.out

    @property
    def codes(self) -> tuple:
        return self.first.code, self.second.code

    @property
    def same_run(self) -> bool:
        return self.codes == (0, 0) and self.said.count("verdict: ") == 1


def node(lab, name):
    """A folder with a checkout's own train_gpt.py and data/, nothing else."""
    folder = lab.root / name
    if not folder.exists():
        folder.mkdir()
        shutil.copy(lab.program, folder / "train_gpt.py")
        made = shutil.ignore_patterns("datasets", "tokenizers", "__pycache__", "manifest.json")
        shutil.copytree(ROOT / "data", folder / "data", ignore=made)
    return folder


def two_nodes(lab, name, knobs, torchrun=False):
    """Two processes in two folders, as torchrun --nnodes 2 starts them or as torchrun sets their variables."""
    port, lives = free_port(), []
    for rank in (0, 1):
        folder, env, command = node(lab, f"{name}_{rank}"), dict(knobs), [sys.executable, "train_gpt.py"]
        if torchrun:
            command[1:1] = ["-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1",
                            "--rdzv-backend=static", "--master_addr=127.0.0.1", f"--master_port={port}"]
        else:
            env |= dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, GROUP_RANK=rank, GROUP_WORLD_SIZE=2,
                        MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        lives.append(Live(folder, knobs.get("RUN_ID", "node"), command, environment(env)))
    first, second = together({0: lives[0].end, 1: lives[1].end}).values()
    return Nodes(first, second)


def stopped_in_one_voice(nodes, folder):
    """All ranks stop, soon, with a message that names the rank or node that lacks something, and its folder."""
    assert 0 not in nodes.codes, nodes.said
    assert max(nodes.first.seconds, nodes.second.seconds) < 60, "nobody waits for a rank that has gone"
    assert "Traceback" not in nodes.said and not STEP.search(nodes.said), nodes.said
    named = re.compile(r"\b(rank|node)s?\b\D{0,3}1\b", re.I)
    lines = (line.removeprefix("interrupted: SystemExit: ") for line in nodes.said.splitlines())
    told = [line for line in lines if named.search(line) and folder in line]
    assert told and len(set(told)) == 1, nodes.said
    return True


@pytest.fixture(scope="module")
def nodes(lab):
    knobs = settings(lab, RUN_ID="node", VAL_DOCS=2)
    seen = {"train": two_nodes(lab, "both", knobs, torchrun=True)}
    # the artifact's own config says where the data are; only node 0 has the artifact
    seen["eval"] = two_nodes(lab, "both", dict(MODE="eval"))
    here = node(lab, "apart_0")
    shutil.copytree(lab.shards, here / "data" / "datasets" / "mine")
    seen["apart"] = two_nodes(lab, "apart", knobs | dict(DATA_PATH="data/datasets/mine"))
    smoke = {k: v for k, v in knobs.items() if k not in ("PRESET", *PATHS)} | dict(VOCAB_SIZE=1024)
    seen["smoke"] = two_nodes(lab, "smoke", smoke)
    return seen


def test_two_nodes_train_one_model(nodes):
    ran = nodes["train"]
    assert ran.same_run, ran.said
    assert "world_size:2" in ran.first.out and "verdict: " in ran.first.out
    assert not any(f.startswith("logs/") for f in ran.second.files), "only rank 0 writes"


def test_two_nodes_score_the_artifact_of_the_first(nodes):
    ran, result = nodes["eval"], re.compile(r"^val_bpb:(\d\.\d+)", re.M)
    assert ran.same_run, ran.said
    assert float(result.findall(ran.said)[0]) == pytest.approx(float(result.findall(nodes["train"].said)[0]), abs=1e-5)


@pytest.mark.parametrize("name, folder", [("apart", "data/datasets/mine"), ("smoke", "data/datasets/local_sp1024")])
def test_a_node_without_the_data_does_the_same_run_or_all_stop(nodes, name, folder):
    ran = nodes[name]
    assert ran.same_run or stopped_in_one_voice(ran, folder), ran.said
