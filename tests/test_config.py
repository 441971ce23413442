"""Room 2: a configuration that is not what its author meant stops before anything is loaded."""
import ast
import dataclasses
import inspect
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, TINY, config, tiny, trainer

tg = trainer()
KNOBS = {f.name.upper(): f for f in dataclasses.fields(tg.Config)}

# What shells, CI systems, schedulers and libraries export. None of it is meant for the trainer.
SHELL = """
    BASH BASHOPTS BASH_ENV BASH_VERSION COLORTERM COLUMNS COMPILER CC CXX CFLAGS LDFLAGS MAKEFLAGS DISPLAY EDITOR EUID
    HISTCONTROL HISTFILE HISTSIZE HOME HOST HOSTNAME HOSTTYPE IFS INPUTRC LANG LANGUAGE LC_ALL LC_CTYPE LESS LESSOPEN LINES
    LOGNAME LS_COLORS MACHTYPE MAIL MANPATH MODEL NAME NODE OLDPWD OPTIND OSTYPE PAGER PATH PIPESTATUS PPID PROMPT
    PROMPT_COMMAND PS1 PS4 PWD RANDOM SECONDS SED AWK SHELL SHELLOPTS SHLVL SPEED STEP TASK TERM TERM_PROGRAM TMPDIR TZ UID USER
    VERSION VISUAL WAYLAND_DISPLAY XAUTHORITY XDG_CACHE_HOME XDG_DATA_DIRS XDG_RUNTIME_DIR XDG_SESSION_ID XPC_FLAGS
    XPC_SERVICE_NAME __CF_USER_TEXT_ENCODING Apple_PubSub_Socket_Render SSH_AUTH_SOCK SSH_CLIENT SSH_CONNECTION SSH_TTY
    SUDO_USER TMUX STY DBUS_SESSION_BUS_ADDRESS SYSTEMD_EXEC_PID INVOCATION_ID JOURNAL_STREAM LD_LIBRARY_PATH LD_PRELOAD
    DYLD_LIBRARY_PATH PKG_CONFIG_PATH HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy no_proxy SSL_CERT_FILE REQUESTS_CA_BUNDLE
    CACHE CACHE_DIR DATASET LOG_LEVEL LOGLEVEL DEBUG VERBOSE OUTPUT_DIR WORKSPACE BUILD_ID BUILD_NUMBER JOB_NAME
    CI GITHUB_ACTIONS GITHUB_RUN_ID GITHUB_RUN_NUMBER GITHUB_SHA GITHUB_WORKSPACE GITHUB_TOKEN RUNNER_OS RUNNER_TEMP
    GITLAB_CI CI_JOB_ID CI_COMMIT_SHA CI_PIPELINE_ID CIRCLECI JENKINS_URL TRAVIS BUILDKITE TF_BUILD
    CONDA_DEFAULT_ENV CONDA_EXE CONDA_PREFIX CONDA_PROMPT_MODIFIER CONDA_PYTHON_EXE CONDA_SHLVL _CE_CONDA MAMBA_EXE
    VIRTUAL_ENV VIRTUAL_ENV_PROMPT PYENV_ROOT PYTHONPATH PYTHONHASHSEED PYTHONUNBUFFERED PYTHON_VERSION PIP_INDEX_URL
    UV_CACHE_DIR POETRY_HOME PYTEST_CURRENT_TEST PYTEST_VERSION
    TORCH_HOME TORCH_COMPILE_DEBUG TORCH_LOGS TORCH_CUDA_ARCH_LIST TORCH_EXTENSIONS_DIR TORCH_DISTRIBUTED_DEBUG
    TORCHINDUCTOR_CACHE_DIR TORCHINDUCTOR_MAX_AUTOTUNE TORCHINDUCTOR_FX_GRAPH_CACHE TORCHINDUCTOR_COMPILE_THREADS
    TORCHINDUCTOR_LOOP_ORDERING_AFTER_FUSION TORCHDYNAMO_VERBOSE PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF
    TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_BLOCKING_WAIT TORCHELASTIC_RUN_ID TORCHELASTIC_MAX_RESTARTS
    TORCHELASTIC_RESTART_COUNT TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE MASTER_ADDR MASTER_PORT GROUP_RANK
    GROUP_WORLD_SIZE ROLE_NAME ROLE_RANK ROLE_WORLD_SIZE LOCAL_WORLD_SIZE
    TRITON_CACHE_DIR TRITON_PRINT_AUTOTUNING TRITON_HOME CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_PATH CUDA_VERSION
    CUDA_LAUNCH_BLOCKING CUDA_DEVICE_ORDER CUDA_DEVICE_MAX_CONNECTIONS CUDA_MODULE_LOADING CUBLAS_WORKSPACE_CONFIG
    CUDNN_VERSION NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NVIDIA_REQUIRE_CUDA NV_CUDA_LIB_VERSION
    NCCL_DEBUG NCCL_VERSION NCCL_IB_DISABLE NCCL_P2P_DISABLE NCCL_SOCKET_IFNAME NCCL_NVLS_ENABLE NCCL_ALGO NCCL_PROTO
    OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS KMP_AFFINITY GLOO_SOCKET_IFNAME UCX_TLS OMPI_COMM_WORLD_RANK
    PMI_RANK SLURM_JOB_ID SLURM_PROCID SLURM_NTASKS SLURM_NODELIST SLURM_STEP_ID SLURM_MEM_PER_NODE SLURM_CPUS_PER_TASK
    PBS_JOBID LSB_JOBID KUBERNETES_SERVICE_HOST KUBERNETES_PORT CONTAINER DOCKER_HOST container RUNPOD_POD_ID
    HF_HOME HF_TOKEN HF_HUB_CACHE HF_DATASETS_CACHE TRANSFORMERS_CACHE TOKENIZERS_PARALLELISM WANDB_API_KEY WANDB_MODE
    WANDB_PROJECT WANDB_RUN_ID VLLM_ATTENTION_BACKEND VLLM_KV_CACHE_LAYOUT KV_REST_API_TOKEN KV_URL AWS_REGION
    AWS_ACCESS_KEY_ID GOOGLE_APPLICATION_CREDENTIALS OPENAI_API_KEY JPY_PARENT_PID COLAB_GPU MPLBACKEND""".split()

RULES = [  # (knobs on top of the smoke preset, the knob that is named, a piece of the reason): one line a rule
    ({"NUM_HEADS": 3}, "NUM_HEADS", "divide MODEL_DIM=128"),
    ({"NUM_KV_HEADS": 3}, "NUM_KV_HEADS", "divide NUM_HEADS=4"),
    ({"ROPE_DIMS": 15}, "ROPE_DIMS", "even"),
    ({"ROPE_DIMS": 34}, "ROPE_DIMS", "at most the head's 32"),
    ({"ROPE_DIMS": 0, "MODEL_DIM": 36}, "ROPE_DIMS", "even"),  # all 9 channels of a head cannot rotate in pairs
    ({"XSA_LAST_N": 6}, "XSA_LAST_N", "NUM_LAYERS=5"),
    ({"LOOP_END": 5}, "LOOP_END", "NUM_LAYERS=5"),
    ({"LOOP_START": 3}, "LOOP_END", "LOOP_START=3"),
    ({"TRAIN_BATCH_TOKENS": 8193}, "TRAIN_BATCH_TOKENS", "multiple of PACK_TOKENS=1024"),
    ({"WORLD_SIZE": 3, "TTT_BATCH_TOKENS": 4098}, "TRAIN_BATCH_TOKENS", "3 ranks"),
    ({"TRAIN_SEQ_SCHEDULE": "128:0.5,64:0.7"}, "TRAIN_SEQ_SCHEDULE", "rising 'value:fraction' pairs below 256"),
    *(({"TRAIN_BATCH_SCHEDULE": text}, "TRAIN_BATCH_SCHEDULE", "pairs") for text in ("0.5", "1.0:.5", "0.0:.5", "0.5:.5,0.25:.7", "2:.5")),
    ({"STEP_RULE": "trellis", "WEIGHT_CODER": "sections"}, "STEP_RULE", "only WEIGHT_CODER=range knows a trellis"),
    ({"MICRO_BATCH_TOKENS": 1023}, "MICRO_BATCH_TOKENS", "PACK_TOKENS=1024"),
    ({"PARALLEL_START_LAYER": 5}, "PARALLEL_START_LAYER", "below 5"),  # would silently give no lanes
    ({"EVAL_STRIDE": 257}, "EVAL_STRIDE", "EVAL_SEQ_LEN=256"),
    ({"VAL_BATCH_TOKENS": 255}, "VAL_BATCH_TOKENS", "EVAL_SEQ_LEN=256"),
    ({"TTT_LORA_SITES": "qx"}, "TTT_LORA_SITES", "letters"),
    ({"PHASED_TTT_PREFIX_DOCS": 5}, "PHASED_TTT_PREFIX_DOCS", "only PHASED_TTT_PLAN=prefix"),
    *(({"TRAIN_SEQ_SCHEDULE": text}, "TRAIN_SEQ_SCHEDULE", "pairs") for text in ("128", "128:1", "256:.5", "1:.5", "64:.5,128:.5")),
    ({"LOGIT_SOFTCAP": 0}, "TTT_ASYM_LOGIT", "LOGIT_SOFTCAP=0"), ({"TRIGRAM_VOCAB_SIZE": 1}, "TRIGRAM_VOCAB_SIZE", "at least 2"),
    ({"VE_LAYERS": "7"}, "VE_LAYERS", "NUM_LAYERS=5"), ({"X0_RESIDUAL": 1}, "X0_RESIDUAL", "two lanes"),
    ({"MIXER": "uu"}, "MIXER", "each once"),
    ({"GATE_WINDOW": 129}, "GATE_WINDOW", "MODEL_DIM=128"),
    ({"GPTQ_RESERVE_SECONDS": 75}, "GPTQ_RESERVE_SECONDS", "leaves nothing of MAX_WALLCLOCK_SECONDS=75"),
    ({"DETERMINISTIC": 1, "ITERATIONS": 1000000}, "ITERATIONS",
     "without a clock (MAX_WALLCLOCK_SECONDS=0 or DETERMINISTIC=1)"),
    # schedules would never get anywhere
    ({"MAX_WALLCLOCK_SECONDS": 0, "ITERATIONS": 1000000}, "ITERATIONS", "say how many"),
    ({"MODEL_DIM": 512, "NUM_HEADS": 1, "NUM_KV_HEADS": 1}, "NUM_HEADS",
     "512 channels: no fast attention goes beyond 256"),
    ({"DOC_ISOLATION": 0}, "DOC_ISOLATION", "TTT_METHOD=lora adapts to one document at a time"),
    ({"TTT_CHUNK_SIZE": 257}, "TTT_CHUNK_SIZE", "EVAL_SEQ_LEN=256"),
    ({"TTT_LORA_SITES": "", "TTT_ASYM_LOGIT": 0}, "TTT_LORA_SITES", "nothing would adapt"),
    ({"PARALLEL_START_LAYER": 2, "NUM_LOOPS": 3}, "PARALLEL_START_LAYER",
     "the lanes would begin inside the loop: when it returns to layer 1, which has one stream, the second lane is lost"),
    *(({"RUN_ID": text}, "RUN_ID", "a file name") for text in ("exp/seed42", "..", "-x", " x", "x ", "a\nb", "a\\b")),
    ({"BIGRAM_VOCAB_SIZE": 1}, "BIGRAM_VOCAB_SIZE", ""),  # one row is the one without a pair: pairs would hash modulo 0
]


def refusal(**env) -> str:
    """The text with which these knobs are refused; fails if they are accepted."""
    with pytest.raises(tg.ConfigError) as error:
        config(**env)
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, meant", [
    ("TTT_LERNING_RATE", "TTT_LORA_RANK"), ("WARMDOWN_ITER", "WARMDOWN_FRAC"), ("SEEED", "SEED"), ("MATRIX_RL", "MATRIX_LR"),
    ("EMA_DECY", "EMA_DECAY"), ("GPTQ_CALIB_BATCHES", "GPTQ_CALIBRATION_BATCHES"), ("NUM_LAYER", "NUM_LAYERS"),
    ("TRAIN_BATCH_TOKEN", "TRAIN_BATCH_TOKENS"), ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"), ("ITERATION", "ITERATIONS"),
    ("MUON_MOMENTUM_WARMUP", "MUON_MOMENTUM_WARMUP_FRAC"), ("XSA_LAST", "XSA_LAST_N")])
def test_mistyped_knob_stops_with_its_name_and_the_nearest(name, meant):
    text = refusal(**{name: 1})
    assert re.search(rf"\b{name}\b", text) and f"did you mean {meant}?" in text


@pytest.mark.parametrize("name", ["LQER_FACTOR_BITS", "QAT_ENABLED", "TTT_WHATEVER", "CASEOPS_ENABLED", "MTP_HEADS", "TRIGRAM_ROWS", "EMBED_LR",
                                  "ADAPTIVE_LR_MAX", "LOGIT_RESCALE_MODE", "SPARSE_ATTN_GATE_SCALE", "ATTN_OUT_GATE_WIDTH", "PRUNE_PCT",
                                  "INT6_LAST_N", "PPM_ALPHA", "ORTHO_INIT", "PREQUANT_ONLY", "QTTT", "VE128"])
def test_techniques_of_other_scripts_that_are_not_here_stop(name):
    assert re.search(rf"\b{name}\b", refusal(**{name: 1}))


@pytest.mark.parametrize("old", sorted(tg.RENAMED))
def test_upstream_spelling_stops_and_names_ours(old):
    text, new = refusal(**{old: 1}), tg.RENAMED[old]
    assert new in KNOBS and old not in KNOBS
    assert re.search(rf"\b{old}\b", text) and re.search(rf"\b{new}\b", text)


def slips(name: str) -> set[str]:
    """What a finger makes of a name: a letter dropped, doubled, or changed with its neighbour.

    Nothing is dropped from four letters: three are left, and those have other owners (SED, MOD).
    """
    at = range(len(name))
    dropped = {name[:i] + name[i + 1:] for i in at if len(name) > 4}
    doubled = {name[:i] + name[i] + name[i:] for i in at}
    swapped = {name[:i] + name[i + 1] + name[i] + name[i + 2:] for i in at[:-1]}
    return (dropped | doubled | swapped) - set(KNOBS)


def test_every_slip_of_the_keyboard_in_every_knob_stops():
    missed = []
    for name in KNOBS:
        for typed in slips(name):
            try:
                tg.refuse_unknown({typed: "1"}, KNOBS)
                missed.append(f"{typed} for {name}")
            except tg.ConfigError:
                pass
    assert not missed, f"{len(missed)} slips are silently ignored: {missed[:12]}"


def test_usual_shell_variables_are_left_alone():
    assert len(SHELL) >= 150 and not set(SHELL) & set(KNOBS)
    stopped = []
    for name in SHELL:  # one by one, so that the failure names them all
        try:
            config(**{name: "some value"})
        except tg.ConfigError as error:
            stopped.append(f"{name}: {error}")
    assert not stopped, "\n".join(stopped)


def test_shell_variables_do_not_change_the_recipe():
    assert config(**dict.fromkeys(["PATH", "HOME", "CUDA_VISIBLE_DEVICES"], "1")) == config()


def test_an_error_does_not_print_a_value_that_may_be_a_secret():
    assert "hunter2" not in refusal(TTT_API_TOKEN="hunter2")


# ----------------------------------------------------------------------------------------------------------------------
# Values
# ----------------------------------------------------------------------------------------------------------------------
def wrong_values(f: dataclasses.Field):
    """Texts that this knob must refuse: wrong type, no number, outside its choices, just outside its bounds."""
    kind, low, high = type(f.default), f.metadata["low"], f.metadata["high"]
    if kind is bool:
        yield from ("", "2", "yes", "True", "-1")
    if kind in (int, float):
        yield from ("", "many", "1,000", "nan", "inf", "-inf")
        outside = [low - 1 if low is not None else None, high + 1 if high is not None else None]
        yield from (str(v) for v in outside if v is not None)
    if kind is int:
        yield from ("1.5", "1e3")
    if f.metadata["choices"]:
        yield from ("nonsense", f.metadata["choices"][-1].upper())


@pytest.mark.parametrize("name", sorted(KNOBS))
def test_wrong_value_stops_and_is_named(name):
    for text in wrong_values(KNOBS[name]):
        error = refusal(**{name: text})
        assert f"{name}=" in error, f"{name}={text!r}: {error}"
        if text.strip():
            assert text.lower().lstrip("-").split(".")[0] in error.lower(), f"{name}={text!r}: the value is missing in {error!r}"


@pytest.mark.parametrize("name", sorted(n for n, f in KNOBS.items() if f.metadata["low"] is not None))
def test_bounds_themselves_are_accepted(name):
    f = KNOBS[name]
    for bound in (f.metadata["low"], f.metadata["high"]):
        if bound is not None:
            assert tg.parse_value(f, str(type(f.default)(bound))) == bound


def test_every_number_has_a_lower_bound():
    """A knob without one takes -1 and does something with it."""
    assert not [n for n, f in KNOBS.items() if type(f.default) in (int, float) and f.metadata["low"] is None]


def test_nearest_choice_is_suggested_and_choices_are_listed():
    text = refusal(ATTN_GATE="spars")
    assert "ATTN_GATE=spars" in text and "did you mean sparse?" in text and "scalar" in text
    assert "did you mean" not in refusal(ATTN_GATE="zzzz")


def test_preset_is_named_like_any_other_choice():
    assert "PRESET=recrod" in refusal(PRESET="recrod") and "did you mean record?" in refusal(PRESET="recrod")


def test_seed_that_the_generators_cannot_take_stops():
    assert "SEED" in refusal(SEED=2 ** 32)  # NumPy's largest is one less


@pytest.mark.parametrize("name, value", [("WORLD_SIZE", "0"), ("WORLD_SIZE", ""), ("RANK", "first"), ("LOCAL_RANK", "1.0")])
def test_broken_launcher_variables_stop_in_words(name, value):
    with pytest.raises(tg.ConfigError, match=f"^config: {name}={value!r}: a rank or a number of ranks expected"):
        tg.launch({name: value})


# ----------------------------------------------------------------------------------------------------------------------
# Rules
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("env, named, reason", RULES, ids=lambda v: v if isinstance(v, str) else " ".join(map(str, v)))
def test_rule_refuses(env, named, reason):
    text = refusal(**env)
    assert text.startswith(f"config: {named}=") and reason in text


def test_lanes_are_refused_just_where_a_visit_would_lose_them():
    """By the plan itself, over all small loops: once there are lanes, every later layer application has them."""
    for layers, start, last, loops, lanes in itertools.product(range(2, 6), range(5), range(5), range(4), range(5)):
        if start <= last < layers and lanes < layers:
            knobs = dict(NUM_LAYERS=layers, XSA_LAST_N=0, NUM_LOOPS=loops, LOOP_START=start, LOOP_END=last,
                         PARALLEL_START_LAYER=lanes)
            texts = {"PRESET": "smoke", **{k: str(v) for k, v in knobs.items()}}
            plan = [bool(v.lanes) for v in tg.layer_plan(tg.load_config(texts, False, check=False), True)]
            if plan == sorted(plan):
                config(**knobs)
            else:
                assert refusal(**knobs).startswith("config: PARALLEL_START_LAYER="), knobs


def test_every_rule_of_validate_is_broken_above():
    """Read from its source: as many lines a knob as there are rules with its name, each with another reason."""
    tree = ast.parse(inspect.getsource(tg.validate))
    rules = next(n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and n.targets[0].id == "rules")
    declared = Counter(rule.elts[1].value for rule in rules.elts)
    broken = Counter(named for _, named, _ in RULES)
    assert not {n: k for n, k in declared.items() if broken[n] < k}


def test_rules_hold_at_their_edge():
    config(ROPE_DIMS=32, XSA_LAST_N=5, LOOP_START=4, LOOP_END=4, EVAL_STRIDE=256, VAL_BATCH_TOKENS=256,
           MICRO_BATCH_TOKENS=2048, GATE_WINDOW=128, WORLD_SIZE=4, DETERMINISTIC=1, ITERATIONS=999999,
           BIGRAM_VOCAB_SIZE=2, TTT_CHUNK_SIZE=256)
    config(NUM_LOOPS=0, LOOP_START=9, LOOP_END=1)  # no loop, no rule about it
    config(MODE="eval", DETERMINISTIC=1, ITERATIONS=1000000)
    config(MODEL_DIM=256, NUM_HEADS=1, NUM_KV_HEADS=1)
    config(DOC_ISOLATION=0, TTT_METHOD="chunk"), config(DOC_ISOLATION=0, TTT_ENABLED=0, TTT_CHUNK_SIZE=512)
    config(TTT_LORA_SITES="", TTT_ASYM_LOGIT=1), config(TTT_LORA_SITES="q", TTT_ASYM_LOGIT=0)
    config(PARALLEL_START_LAYER=1, NUM_LOOPS=3), config(PARALLEL_START_LAYER=2, NUM_LOOPS=3, PARALLEL_RESIDUAL="one")
    config(RUN_ID="seed 42, 4.5x"), config(MICRO_BATCH_TOKENS=0)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 16])
def test_batch_divides_over_ranks_or_stops(world):
    blocks = config().blocks_per_batch  # 4
    if blocks % world == 0:
        assert config(WORLD_SIZE=world) == config()
    else:
        assert f"do not divide over {world} ranks" in refusal(WORLD_SIZE=world, TTT_BATCH_TOKENS=48)


# ----------------------------------------------------------------------------------------------------------------------
# Presets, hash, description
# ----------------------------------------------------------------------------------------------------------------------
def test_default_preset_follows_the_gpu():
    assert tg.load_config({}, cuda=True).preset == "record" and tg.load_config({}, cuda=False).preset == "smoke"
    assert tg.load_config({"PRESET": ""}, cuda=True).preset == "record"
    assert tg.load_config({"PRESET": "baseline"}, cuda=False).preset == "baseline"


@pytest.mark.parametrize("preset", sorted(tg.PRESETS))
def test_preset_resolves_and_the_environment_wins(preset):
    cfg = config(PRESET=preset)
    for name, f in KNOBS.items():
        expected = tg.PRESETS[preset].get(f.name, f.default) if name != "PRESET" else preset
        assert getattr(cfg, f.name) == expected
    assert config(PRESET=preset, MATRIX_LR=0.011).matrix_lr == 0.011
    assert config(PRESET=preset, MATRIX_LR=0.011) == dataclasses.replace(cfg, matrix_lr=0.011)


@pytest.mark.parametrize("preset", sorted(tg.PRESETS))
def test_preset_values_pass_the_checks_of_the_environment(preset):
    for name, value in tg.PRESETS[preset].items():
        f = KNOBS[name.upper()]
        assert type(value) is type(f.default), name  # 2 for 2.0 would be another recipe hash
        tg.check_value(f, value)


def test_defaults_pass_their_own_checks():
    for f in KNOBS.values():
        tg.check_value(f, f.default)


def test_base_lies_between_preset_and_environment():
    base = {"matrix_lr": 0.5, "scalar_lr": 0.5}
    cfg = tg.load_config({"PRESET": "smoke", "SCALAR_LR": "0.25"}, False, base)
    assert (cfg.matrix_lr, cfg.scalar_lr, cfg.model_dim) == (0.5, 0.25, tg.SMOKE["model_dim"])


def test_recipe_hash_is_of_the_recipe_only():
    own = config().recipe_hash()
    assert re.fullmatch("[0-9a-f]{12}", own)
    assert config(SEED=7).recipe_hash() == config(RUN_ID="x", ARTIFACT_DIR="y", MODE="config").recipe_hash() == own
    for change in ({"MATRIX_LR": 0.0261}, {"PRESET": "record"}, {"MATRIX_BITS": 5}, {"ATTN_GATE": "out"}, {"TTT_LR": 0.01}):
        assert config(**change).recipe_hash() != own
    assert config(MATRIX_LR=KNOBS["MATRIX_LR"].default).recipe_hash() == own  # saying the default changes nothing


@pytest.mark.parametrize("name", sorted(n for n, f in KNOBS.items() if type(f.default) in (bool, int, float)))
def test_every_number_but_seed_sampling_and_rows_is_in_the_recipe_hash(name):
    cfg, f = config(), KNOBS[name]
    value = getattr(cfg, f.name)
    changed = dataclasses.replace(cfg, **{f.name: not value if isinstance(value, bool) else value + 1})
    # the last one is the GPU's memory
    outside = name in ("SEED", "SAMPLE_TOKENS", "SAMPLE_TEMPERATURE", "MICRO_BATCH_TOKENS")
    assert (changed.recipe_hash() == cfg.recipe_hash()) == outside


def test_describe_marks_what_differs_from_the_record():
    lines = config(PRESET="record", MATRIX_LR=0.03).describe()
    assert sorted(line[2:].split("=")[0] for line in lines) == sorted(KNOBS)
    assert {line for line in lines if line[0] == "*"} == {"* MATRIX_LR=0.03", "* PRESET=record"}
    assert "  SCALAR_LR=0.02" in lines


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().seed = 1


def test_the_tests_tiny_config_is_valid():
    cfg = tiny()
    assert (cfg.model_dim, cfg.head_dim, cfg.vocab_size) == (TINY["MODEL_DIM"], 16, 64)


# ----------------------------------------------------------------------------------------------------------------------
# The real process, in an empty folder: no data, no tokenizer, no logs
# ----------------------------------------------------------------------------------------------------------------------
def process(folder, **env) -> subprocess.CompletedProcess:
    """train_gpt.py with only these knobs set."""
    clean = {k: v for k, v in os.environ.items() if k not in KNOBS}
    return subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], cwd=folder, env={**clean, **env},
                          capture_output=True, text=True, timeout=60)


def test_process_stops_on_a_mistyped_knob_before_it_writes(tmp_path):
    done = process(tmp_path, TTT_LERNING_RATE="1")
    assert done.returncode == 1
    assert "TTT_LERNING_RATE" in done.stderr and "did you mean TTT_LORA_RANK?" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset, params", [("record", 38828683), ("baseline", 17059912)])
def test_process_shows_the_config_without_data(tmp_path, preset, params):
    done = process(tmp_path, MODE="config", PRESET=preset)
    assert done.returncode == 0, done.stderr
    assert f"model_params:{params}\n" in done.stdout
    assert f"preset:{preset} recipe:{config(PRESET=preset, MODE='config').recipe_hash()}\n" in done.stdout
    assert all(f"{name}=" in done.stdout for name in KNOBS)
    assert not list(tmp_path.iterdir())


def test_artifacts_of_earlier_versions_are_read_where_a_removed_knob_was_off():
    """A knob that was removed is refused only where it did something."""
    stored = {**config().as_dict(), **tg.REMOVED}
    assert not {n.upper() for n in tg.REMOVED} & KNOBS.keys() and tg.restore_config({}, stored, Path("old.artifact")).seed == stored["seed"]
    for name, value in {"muon_beta2": 0.95, "attn_window": "512:1", "not_known_to_anyone": 0}.items():
        with pytest.raises(SystemExit, match=f"old.artifact: made with knobs that are unknown here: {name}$"):
            tg.restore_config({}, {**stored, name: value}, Path("old.artifact"))


def test_artifacts_that_knew_no_fp8_stay_in_bf16_and_name_no_backend():
    """What they learn between documents is what they were scored with; how attention is computed is another machine's business."""
    stored = {**config(PRESET="pr2135").as_dict(), "attn_backend": "fa3"}
    del stored["fp8"]
    restored = tg.restore_config({}, stored, Path("old.artifact"))
    assert (restored.fp8, restored.attn_backend) == ("none", "auto")
    assert tg.restore_config({"FP8": "mlp", "ATTN_BACKEND": "sdpa"}, stored, Path("old.artifact")).fp8 == "mlp"
    assert tg.restore_config({}, config(PRESET="record").as_dict(), Path("new.artifact")).fp8 == "mlp"


@pytest.mark.parametrize("name", sorted(n.upper() for n in tg.REMOVED))
def test_a_removed_knob_stops_the_run(name):
    """LOOP_MIX and ATTN_WINDOW were once passed over in silence: neither word belongs to this contest alone."""
    assert refusal(**{name: 1}).startswith(f"config: {name} was a knob once")
    assert f"`{name}" in (ROOT / "records" / "README.md").read_text()


def test_artifacts_whose_knob_was_text_before_it_was_a_number():
    """TTT_CHUNK_SIZE could be a schedule once: one size is the same number, and for a schedule there must be another."""
    stored = {**config().as_dict(), "ttt_chunk_size": "48"}
    assert tg.restore_config({}, stored, Path("old.artifact")).ttt_chunk_size == 48
    stored["ttt_chunk_size"] = "256:16,48"
    with pytest.raises(tg.ConfigError, match="TTT_CHUNK_SIZE='256:16,48': int expected"):
        tg.restore_config({}, stored, Path("old.artifact"))
    assert tg.restore_config({"TTT_CHUNK_SIZE": "32"}, stored, Path("old.artifact")).ttt_chunk_size == 32


def gpu_settings():
    """Every dict(KNOB="value", ...) or {"KNOB": "value", ...} of the tests for a GPU, constants only, by its line."""
    for node in ast.walk(ast.parse((ROOT / "tests/gpu/test_gpu.py").read_text())):
        pairs = []
        if isinstance(node, ast.Dict):
            pairs = [(k.value, v) for k, v in zip(node.keys, node.values) if isinstance(k, ast.Constant)]
        if isinstance(node, ast.Call):
            pairs = [(k.arg, k.value) for k in node.keywords]
        knobs = {k: v.value for k, v in pairs if str(k).isupper() and isinstance(v, ast.Constant)}
        if knobs:
            yield pytest.param(knobs, id=f"line-{node.lineno}")


@pytest.mark.parametrize("knobs", gpu_settings())
def test_knobs_of_the_tests_for_a_gpu_are_still_knobs(knobs):
    """They run where there is a GPU only; a value that no longer parses would be found there, on paid time."""
    tg.load_config(knobs, True)
