"""The rules of the house, kept by AST: `train_gpt.py` is read as text, never imported, so this runs without torch.

Every rule is one function `House -> list of violations` such as `room 7 line 812: forward reads cfg.xsa_last_n`.
Each rule is applied twice: to the repository's train_gpt.py, and to small planted houses (bottom half of this file)
in which the offending lines carry the mark `# BAD`. A rule must flag exactly the marked lines, so a rule that cannot
fail, or that cries wolf, fails here.
"""
import ast
import io
import re
import statistics
import textwrap
import tokenize
from functools import cached_property
from pathlib import Path

import pytest

TRAIN_GPT = Path(__file__).resolve().parent.parent / "train_gpt.py"

# The file's limit counts lines that bear code: comments, docstrings and blank lines are what makes the others short to read.
# It was 3,000 until seven published systems, kernels with their gradients and a range coder had moved in, 3,300 until the MLP's
# products in FP8, 3,340 until attention's own kernels, for which a library of 60 MB went, and 3,478 until a layer's norms, rotation
# and residual stream moved into its products, 8 % of a step, and 3,613 until the file met the world outside its bench: sidecars as the
# contest writes them and text that holds operators, launches and arguments that cannot be meant, memory of any GPU (rows, slots in
# groups, tiles, adaptation without Triton), any number of ranks and nodes, files that say anything, and deaths that say how to go on.
# What a run can do without (corpus, benchmark, trackers, tables of the README) lives beside the file.
MAX_FUNCTION, MAX_CLASS, MAX_FILE, MAX_MEDIAN = 60, 150, 4223, 14
ROOMS = 19
MIN_COMMENTS = 12  # lines that bear a comment, per 100 lines that bear code

MUTABLE_GLOBALS = {"HAVE", "SOURCE"}
# Knobs that only room 2's validation reads. Each entry needs its reason in a comment; the list starts empty.
VALIDATION_ONLY_KNOBS = set()

RULER = re.compile(r"# -{40,}$")
HEADING = re.compile(r"# (\d+)\. ([A-Z][A-Z ,&-]+) -( |$)")
NUMBERED = re.compile(r"# \d+\. ")
CONSTANT_NAME = re.compile(r"_*[A-Z][A-Z0-9_]*$|__\w+__$")
# Comments addressed to a tool say nothing to a reader, so they do not count as comments.
PRAGMA = re.compile(r"#\s*(noqa|type:|fmt:|pragma|pylint|ruff|!)")
# Preceded by a word or a dot it is prose ("threads/workers") or a relative path ("./tmp"), not a machine's path.
MACHINE_PATH = re.compile(r"(?<![\w.])/(work|workspace|root|tmp|home|mnt|Users)\b")

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp, ast.Call)
SCOPES = (*FUNCTIONS, ast.ClassDef, ast.Lambda, *COMPREHENSIONS)
IMPORTS = (ast.Import, ast.ImportFrom)
TYPE_FACTORIES = {"namedtuple", "NamedTuple", "TypeVar", "NewType"}  # calls that make a type, not a mutable value
MUTATORS = set("append extend insert add update pop popitem popleft appendleft remove discard clear setdefault sort "
               "reverse __setitem__ __delitem__".split())


# ----------------------------------------------------------------------------------------------------------------------
# Reading: scopes and names
# ----------------------------------------------------------------------------------------------------------------------
def own_nodes(nodes):
    """Nodes that belong to one scope: through if/for/try/with, but not into functions, classes or comprehensions."""
    for node in nodes:
        yield node
        if not isinstance(node, SCOPES):
            yield from own_nodes(ast.iter_child_nodes(node))


def bound_names(node):
    """Names that this one node binds in its scope."""
    if isinstance(node, ast.Name):
        return [] if isinstance(node.ctx, ast.Load) else [node.id]
    if isinstance(node, IMPORTS):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
        return [node.name] if node.name else []
    return []


def local_names(function):
    """Names local to a function or lambda: arguments and whatever it binds, less what it declares global."""
    a = function.args
    names = {arg.arg for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg] if arg}
    body = [function.body] if isinstance(function, ast.Lambda) else function.body
    nodes = list(own_nodes(body))
    names.update(name for node in nodes for name in bound_names(node))
    outer = {name for node in nodes if isinstance(node, (ast.Global, ast.Nonlocal)) for name in node.names}
    return names - outer


class ModuleNames(ast.NodeVisitor):
    """Collects the Name nodes (reads only) that resolve to the module's scope or to a builtin; skips annotations."""

    def __init__(self, tree):
        self.scopes, self.found = [], []  # scopes: (is_class, names), innermost last
        self.visit(tree)

    def visit_Name(self, node):
        # A class body's names are visible in that body only, not in its methods.
        visible = [names for i, (is_class, names) in enumerate(self.scopes)
                   if not is_class or i == len(self.scopes) - 1]
        if isinstance(node.ctx, ast.Load) and not any(node.id in names for names in visible):
            self.found.append(node)

    def inside(self, is_class, names, nodes):
        self.scopes.append((is_class, names))
        for node in nodes:
            self.visit(node)
        self.scopes.pop()

    def visit_FunctionDef(self, node):
        # Decorators and defaults run in the enclosing scope.
        outside = [*getattr(node, "decorator_list", []), *node.args.defaults, *filter(None, node.args.kw_defaults)]
        for child in outside:
            self.visit(child)
        self.inside(False, local_names(node), [node.body] if isinstance(node, ast.Lambda) else node.body)

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_ClassDef(self, node):
        for child in [*node.decorator_list, *node.bases, *node.keywords]:
            self.visit(child)
        self.inside(True, {name for n in own_nodes(node.body) for name in bound_names(n)}, node.body)

    def visit_comprehension_scope(self, node):
        targets = {n.id for gen in node.generators for n in ast.walk(gen.target) if isinstance(n, ast.Name)}
        self.inside(False, targets, ast.iter_child_nodes(node))

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehension_scope

    def visit_AnnAssign(self, node):
        for child in filter(None, [node.target, node.value]):
            self.visit(child)


def root_name(node):
    """The Name at the left end of `a.b["c"].d`, or None."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node if isinstance(node, ast.Name) else None


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def length(node):
    """Lines from `def`/`class` to the end, docstring included, decorators not."""
    return node.end_lineno - node.lineno + 1


# ----------------------------------------------------------------------------------------------------------------------
# Reading: one parsed file
# ----------------------------------------------------------------------------------------------------------------------
class House:
    """A parsed train_gpt.py: which room a line lies in, which names are the module's, what a dotted name means."""

    def __init__(self, source):
        self.source, self.lines, self.tree = source, source.splitlines(), ast.parse(source)
        self.nodes = list(ast.walk(self.tree))
        self.functions = [n for n in self.nodes if isinstance(n, FUNCTIONS)]
        self.classes = [n for n in self.nodes if isinstance(n, ast.ClassDef)]
        self.module_names = ModuleNames(self.tree).found
        self.module_name_ids = {id(n) for n in self.module_names}

    def room(self, line):
        """Number of the room that a line lies in; 0 before the first banner."""
        return max((start, number) for start, number in [(0, 0), *self.headings] if start <= line + 1)[1]

    def flag(self, where, message):
        """One readable violation at a node or a line number."""
        line = where if isinstance(where, int) else where.lineno
        return f"room {self.room(line)} line {line}: {message}"

    @cached_property
    def tokens(self):
        return list(tokenize.generate_tokens(io.StringIO(self.source).readline))

    @cached_property
    def comments(self):
        """Line -> comment text, from the tokens, so a '#' inside a string is not taken for one."""
        return {t.start[0]: t.string.rstrip() for t in self.tokens if t.type == tokenize.COMMENT}

    @cached_property
    def headings(self):
        """(line, number) of each banner's numbered line; the ruler one line above already belongs to the room."""
        matches = [(line, HEADING.match(text)) for line, text in sorted(self.comments.items())
                   if RULER.match(self.comments.get(line - 1, ""))]
        return [(line, int(m[1])) for line, m in matches if m]

    @cached_property
    def docstrings(self):
        """The Constant nodes that are docstrings."""
        owners = [n for n in self.nodes if isinstance(n, (ast.Module, ast.ClassDef, *FUNCTIONS)) and n.body]
        return [n.body[0].value for n in owners if isinstance(n.body[0], ast.Expr) and is_text(n.body[0].value)]

    @cached_property
    def bindings(self):
        """(name, binding node, top-level statement) of every module-level binding."""
        return [(name, node, statement) for statement in self.tree.body
                for node in own_nodes([statement]) for name in bound_names(node)]

    @cached_property
    def aliases(self):
        """Imported name -> dotted origin, anywhere in the file: `import numpy as np` gives np -> numpy."""
        found = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found.update({a.asname: a.name for a in node.names if a.asname})
            if isinstance(node, ast.ImportFrom):
                found.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
        return found

    @cached_property
    def local_imports(self):
        """Names imported inside functions: they are local, and yet they mean the module."""
        top = {id(node) for _, node, _ in self.bindings}
        return {name for n in self.nodes if isinstance(n, IMPORTS) and id(n) not in top for name in bound_names(n)}

    def qualified(self, node):
        """Dotted meaning of a name or attribute chain (`np.load` -> numpy.load), None if its root is a local."""
        if isinstance(node, ast.Attribute):
            base = self.qualified(node.value)
            return base and f"{base}.{node.attr}"
        if isinstance(node, ast.Name) and (id(node) in self.module_name_ids or node.id in self.local_imports):
            return self.aliases.get(node.id, node.id)
        return None

    @cached_property
    def uses(self):
        """(node, dotted name) of everything used or imported, import by string included."""
        found = []
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found += [(node, a.name) for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                found += [(node, f"{node.module}.{a.name}") for a in node.names]
            elif isinstance(node, ast.Call) and node.args and is_text(node.args[0]):
                if self.qualified(node.func) in ("__import__", "importlib.import_module"):
                    found.append((node, node.args[0].value))
            elif self.qualified(node):
                found.append((node, self.qualified(node)))
        return found


# ----------------------------------------------------------------------------------------------------------------------
# 1. Rooms
# ----------------------------------------------------------------------------------------------------------------------
def contract(house, line):
    """Words of the banner whose heading is at `line`, or None if no ruler closes it."""
    words, text = house.comments[line].partition(" -")[2].split(), ""
    while text is not None:
        line += 1
        text = house.comments.get(line)
        if text and RULER.match(text):
            return words
        words += (text or "").lstrip("# ").split()
    return None


def banner_violations(house):
    """Banners that are malformed: no ruler above or below, a heading not in the form, a contract of under 3 words."""
    bad, good = [], {line for line, _ in house.headings}
    for line, text in house.comments.items():
        ruled = RULER.match(house.comments.get(line - 1, ""))
        if line in good:
            words = contract(house, line)
            if words is None:
                bad.append(house.flag(line, "no ruler closes the banner"))
            elif len(words) < 3:
                bad.append(house.flag(line, "the banner has no contract"))
        elif HEADING.match(text) or (ruled and NUMBERED.match(text)):
            bad.append(house.flag(line, f"not a banner of the form ruler, '# N. NAME - contract', ruler: {text}"))
    return bad


def room_violations(house):
    """Rooms 1..ROOMS in order, each once; room 0 is the module docstring and holds nothing else."""
    bad, seen = banner_violations(house), [number for _, number in house.headings]
    bad += [f"room {n}: there is no banner" for n in range(1, ROOMS + 1) if n not in seen]
    for (line, number), before in zip(house.headings, [0, *seen]):
        if number <= before or number > ROOMS:
            bad.append(house.flag(line, f"banner {number} follows banner {before}"))
    if not ast.get_docstring(house.tree):
        bad.append("room 0: there is no module docstring")
    bad += [house.flag(n, "code above the first banner") for n in house.tree.body
            if house.room(n.lineno) == 0 and getattr(n, "value", None) not in house.docstrings]
    return bad


# ----------------------------------------------------------------------------------------------------------------------
# 2. Define before use, no mutable globals
# ----------------------------------------------------------------------------------------------------------------------
def upward_violations(house):
    """A room uses only rooms above it, function bodies included, annotations excluded."""
    home = {}
    for name, node, _ in house.bindings:
        home[name] = min(home.get(name, 99), house.room(node.lineno))
    return [house.flag(n, f"uses {n.id}, which room {home[n.id]} defines") for n in house.module_names
            if home.get(n.id, 0) > house.room(n.lineno)]


def makes_mutable(value):
    """Whether an assigned value is, or holds, a display or a call (types made by a call do not count)."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in TYPE_FACTORIES:
        return False
    return any(isinstance(n, DISPLAYS) for n in [value, *own_nodes([value])])


def global_value_violations(house):
    """A module-level name that holds a mutable value is spelled as a constant."""
    bad = []
    for node in own_nodes(house.tree.body):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value and makes_mutable(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and bound_names(n)]
            bad += [house.flag(node, f"global {n} holds a mutable value but is not UPPER_CASE")
                    for n in names if not CONSTANT_NAME.match(n)]
    return bad


def rebinding_violations(house):
    """A module-level name is bound by one top-level statement (if/else and try/except are one) and never `global`."""
    bad, first = [], {}
    for name, node, statement in house.bindings:
        if isinstance(node, IMPORTS) or name in MUTABLE_GLOBALS or name == "_":
            continue
        if first.setdefault(name, statement) is not statement:
            bad.append(house.flag(node, f"global {name} is bound again (first on line {first[name].lineno})"))
    for node in house.nodes:
        if isinstance(node, ast.Global) and not MUTABLE_GLOBALS.issuperset(node.names):
            bad.append(house.flag(node, f"global statement: {', '.join(node.names)}"))
    return bad


def shadowing_import_violations(house):
    """No function imports under a name of the module's: `import torch.x` makes `torch` a local that is unset above that line."""
    top, ours = {id(node) for _, node, _ in house.bindings}, {name for name, _, _ in house.bindings}
    return [house.flag(node, f"import inside a function hides the module's {name}") for node in house.nodes
            if isinstance(node, IMPORTS) and id(node) not in top for name in bound_names(node) if name in ours]


def mutated_targets(node):
    """Expressions whose object this node changes in place: `X[k] = v`, `X.a += v`, `X.append(v)`, `setattr(X, ...)`."""
    if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
        return [node.value]
    if not isinstance(node, ast.Call):
        return []
    if isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
        return [node.func.value]
    if isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr") and node.args:
        return [node.args[0]]
    return []


def mutation_violations(house):
    """No module-level object is changed outside the statement that defines it (imported modules are not ours)."""
    homes = {name: (node, statement) for name, node, statement in house.bindings if not isinstance(node, IMPORTS)}
    bad = []
    for node in house.nodes:
        for target in mutated_targets(node):
            root = root_name(target)
            if root is None or id(root) not in house.module_name_ids or root.id not in homes:
                continue
            definition, statement = homes[root.id]
            is_type = isinstance(definition, (*FUNCTIONS, ast.ClassDef))
            within = statement.lineno <= node.lineno <= statement.end_lineno and not is_type
            # `Ema.update(x)` calls a method of a class; only `Ema.table.update(x)` or `Ema.n = 1` changes it.
            method = is_type and target is root and isinstance(getattr(node, "func", None), ast.Attribute)
            if root.id not in MUTABLE_GLOBALS and not within and not method:
                bad.append(house.flag(node, f"changes global {root.id} in place"))
    return bad


# ----------------------------------------------------------------------------------------------------------------------
# 3. Monopolies
# ----------------------------------------------------------------------------------------------------------------------
# what it is, dotted names that are it, rooms that may use it. An import statement in room 1 is always in order.
MONOPOLIES = [
    ("the environment", r"os\.(environb?|getenvb?|putenv|unsetenv)", {2}),
    ("the terminal", r"(builtins\.)?print|sys\.(stdout|stderr)", {3}),
    ("a clock", r"(time|timeit)\.\w+|datetime\.datetime\.(now|utcnow|today)", {3}),
    ("a codec", r"brotli|zstandard|lzma|zlib|bz2|gzip", {1, 13}),
    ("SentencePiece", r"sentencepiece", {1, 4}),
    ("a hardware probe", r"torch\.cuda\.(is_available|get_device_(capability|properties|name))", {1, 3, 6}),
]
HARDWARE_ROOMS = {1, 3, 6}
LOG_ROOM, NAMES_ROOM = 3, 9
# Keys of HAVE that ask for a Python package; every other key (triton, varlen, cuda, ...) is a hardware question.
SOFTWARE_KEYS = {"brotli", "zstd", "zstandard", "lzma", "zlib", "bz2", "gzip", "sentencepiece"}
# Unmistakable even before the file's own modules are known: `blocks.`, `blocks\.`, `.weight`, `tok_emb`, `c_proj`.
PARAMETER_NAME = re.compile(r"\b(blocks|layers)\\?\.|\.(weight|bias)\b|"
                            r"\b(tok_emb|lm_head|wte|wpe|[cqkvo]_proj|c_(q|k|v|qkv|fc|attn))\b")


def name_monopoly_violations(house):
    """The environment, terminal, clocks, codecs, SentencePiece and hardware probes each belong to their rooms."""
    bad = []
    for node, name in house.uses:
        room = house.room(node.lineno)
        for what, pattern, rooms in MONOPOLIES:
            match = re.match(rf"({pattern})(\.|$)", name)
            if match and room not in rooms and not (room == 1 and isinstance(node, IMPORTS)):
                bad.append(house.flag(node, f"{match[1]} is {what}, which belongs to room {sorted(rooms)}"))
    return bad


def write_mode(call):
    """The mode string of an `open(...)` or `x.open(...)` call, "w" for `x.write_text(...)`, else ""."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "write_text":
        return "w"
    if name != "open":
        return ""
    arguments = [*call.args, *(k.value for k in call.keywords if k.arg == "mode")]
    modes = [a.value for a in arguments if is_text(a) and re.fullmatch(r"[rwaxbt+]{1,4}", a.value)]
    return modes[-1] if modes else ""


def text_file_violations(house):
    """Text is written to files in room 3 only: those are logs. Binary files (artifact, checkpoint) are free."""
    calls = [n for n in house.nodes if isinstance(n, ast.Call) and house.room(n.lineno) != LOG_ROOM]
    return [house.flag(n, f"writes a text file (mode {write_mode(n)!r}), which belongs to room {LOG_ROOM}")
            for n in calls if re.search("[wax+]", write_mode(n)) and "b" not in write_mode(n)]


def have_key(node):
    """The key of `HAVE["x"]`, `HAVE.get("x")` or `HAVE.x`, else None; a key that is a variable is not decidable."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "HAVE.get" and node.args:
        key = node.args[0]
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and ast.unparse(node.value) == "HAVE":
        key = node.slice
    elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "HAVE" and node.attr not in dir(dict):
        return node.attr
    else:
        return None
    return key.value if is_text(key) else None


def hardware_violations(house):
    """Branches on hardware: HAVE's hardware keys, `x.is_cuda`, `device.type == "cuda"`."""
    bad = []
    for node in house.nodes:
        if house.room(getattr(node, "lineno", 0)) in HARDWARE_ROOMS:
            continue
        key = have_key(node)
        if key and key not in SOFTWARE_KEYS:
            bad.append(house.flag(node, f"HAVE[{key!r}] is a hardware branch, which belongs to room 6"))
        elif isinstance(node, ast.Attribute) and node.attr == "is_cuda":
            bad.append(house.flag(node, "is_cuda is a hardware branch, which belongs to room 6"))
        elif isinstance(node, ast.Compare) and any(is_text(s) and s.value == "cuda"
                                                   for s in [node.left, *node.comparators]):
            bad.append(house.flag(node, "comparing with 'cuda' is a hardware branch, which belongs to room 6"))
    return bad


def registered_strings(house):
    """First arguments of register_buffer and its kin: there a string defines a name, it does not look one up."""
    names = {"register_buffer", "register_parameter", "register_module", "add_module"}
    return [n.args[0] for n in house.nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
            and n.func.attr in names and n.args and is_text(n.args[0])]


def parameter_attributes(house):
    """Names under which the file's own modules hold parameters and sub-modules, less those that are knobs as well."""
    modules = {c.name for c in module_classes(house)}
    names = {s.value for s in registered_strings(house)}
    for node in [n for c in module_classes(house) for n in ast.walk(c) if isinstance(n, ast.Assign)]:
        made = {ast.unparse(c.func) for c in ast.walk(node.value) if isinstance(c, ast.Call)}
        if any(f in modules or re.match(r"(torch\.)?nn\.[A-Z]|Parameter$", f) for f in made):
            names.update(t.attr for t in node.targets if isinstance(t, ast.Attribute))
    return names - set(knobs(house))


def looks_like_parameter(text, attributes):
    """Prose (anything with a space) never does; `self.gate` makes "attn.gate" suspect, but not the enum "gate"."""
    if re.search(r"\s", text):
        return False
    words = re.split(r"\W+", text)
    return bool(PARAMETER_NAME.search(text)) or any(w in attributes and ("_" in w or "." in text) for w in words)


def string_texts(house):
    """(node, text) of every string that is not a docstring; an f-string is one text with its fields as "0"."""
    skip = {id(n) for n in [*house.docstrings, *registered_strings(house)]}
    for node in house.nodes:
        if isinstance(node, ast.JoinedStr):
            skip.update(id(v) for v in node.values)
            yield node, "".join(v.value if is_text(v) else "0" for v in node.values)
        elif is_text(node) and id(node) not in skip:
            yield node, node.value


def parameter_string_violations(house):
    """Strings that name parameters live in the parameter table."""
    attributes = parameter_attributes(house)
    return [house.flag(node, f"string {text!r} names a parameter, which belongs to room {NAMES_ROOM}")
            for node, text in string_texts(house)
            if house.room(node.lineno) != NAMES_ROOM and looks_like_parameter(text, attributes)]


# ----------------------------------------------------------------------------------------------------------------------
# 4. Size and comments
# ----------------------------------------------------------------------------------------------------------------------
def size_violations(house):
    """Limits on each function, each class, the file, and the median function."""
    bad = [house.flag(n, f"{n.name} has {length(n)} lines (limit {limit})")
           for nodes, limit in ((house.functions, MAX_FUNCTION), (house.classes, MAX_CLASS))
           for n in nodes if length(n) > limit]
    if len(code_lines(house)) > MAX_FILE:
        bad.append(f"file: {len(code_lines(house))} lines of code (limit {MAX_FILE})")
    median = statistics.median(map(length, house.functions)) if house.functions else 0
    if median > MAX_MEDIAN:
        bad.append(f"file: the median function has {median} lines (limit {MAX_MEDIAN})")
    return bad


def code_lines(house):
    """Non-blank lines that bear code: comment-only lines and docstrings do not count."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    found = {line for t in house.tokens if t.type not in layout for line in range(t.start[0], t.end[0] + 1)}
    found -= {line for d in house.docstrings for line in range(d.lineno, d.end_lineno + 1)}
    return [line for line in found if house.lines[line - 1].strip()]


def comment_violations(house):
    """Enough comments; rulers and pragmas are not comments."""
    comments = [c for c in house.comments.values() if not RULER.match(c) and not PRAGMA.match(c) and c.strip("# ")]
    rate = 100 * len(comments) / max(len(code_lines(house)), 1)
    return [f"file: {rate:.1f} comments per 100 lines of code (at least {MIN_COMMENTS})"] * (rate < MIN_COMMENTS)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Knobs
# ----------------------------------------------------------------------------------------------------------------------
def is_knob(statement):
    return (isinstance(statement, ast.AnnAssign) and isinstance(statement.value, ast.Call)
            and isinstance(statement.value.func, ast.Name) and statement.value.func.id == "knob")


def config_classes(house):
    """Classes of room 2 that are Config, one of its bases (by name, transitively), or declare knobs."""
    room = {c.name: c for c in house.classes if house.room(c.lineno) == 2}
    found, todo = {n for n, c in room.items() if any(map(is_knob, c.body))}, ["Config"]
    while todo:
        cls = room.get(todo.pop())
        if cls is not None:
            found.add(cls.name)
            todo += [b.id for b in cls.bases if isinstance(b, ast.Name) and b.id != cls.name]
    return [c for n, c in room.items() if n in found]


def knobs(house):
    """Knob name -> the statement that declares it (the first, if there are several)."""
    declared = {}
    for statement in [s for c in config_classes(house) for s in c.body if is_knob(s)]:
        declared.setdefault(statement.target.id, statement)
    return declared


def is_config(node):
    """`cfg`, `c`, `eval_cfg`, `self.cfg`: the ways in which a config is spelled."""
    if isinstance(node, ast.Name):
        return node.id in ("cfg", "c") or node.id.endswith("_cfg")
    return isinstance(node, ast.Attribute) and node.attr == "cfg"


def knob_declaration_violations(house):
    """Each field of the config is one `name: type = knob(...)`, declared once (ClassVar is no field)."""
    declared, bad = knobs(house), []
    if not declared or not any(c.name == "Config" for c in config_classes(house)):
        bad.append("room 2: no class Config with knobs")
    for statement in [s for c in config_classes(house) for s in c.body if isinstance(s, ast.AnnAssign)]:
        name = statement.target.id
        if not is_knob(statement) and "ClassVar" not in ast.unparse(statement.annotation):
            bad.append(house.flag(statement, f"config field {name} is not declared with knob(...)"))
        elif declared.get(name, statement) is not statement:
            bad.append(house.flag(statement, f"knob {name} is declared again"))
    return bad


def live_names(house):
    """Attributes of the config that are read outside room 2, directly or through properties that are."""
    members = {f.name: f for c in config_classes(house) for f in c.body if isinstance(f, FUNCTIONS)}
    properties = {n for n, f in members.items() if any("property" in ast.unparse(d) for d in f.decorator_list)}
    live = {n.attr for n in house.nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
            and is_config(n.value) and house.room(n.lineno) != 2}
    # Start from properties only: `cfg.validate()` is called from outside as well, and reads every knob.
    todo, seen = list(live & properties), set()
    while todo:
        name = todo.pop()
        seen.add(name)
        reads = {n.attr for n in ast.walk(members[name]) if isinstance(n, ast.Attribute)
                 and isinstance(n.value, ast.Name) and n.value.id == "self"}
        live |= reads
        todo += [r for r in reads if r in members and r not in seen]
    return live


def dead_knob_violations(house):
    """Every knob is read outside room 2, or by a property that is; the allow-list has no idle entries."""
    live, declared = live_names(house), knobs(house)
    bad = [house.flag(s, f"knob {n} is never read outside room 2") for n, s in declared.items()
           if n not in live | VALIDATION_ONLY_KNOBS]
    return bad + [f"VALIDATION_ONLY_KNOBS: {n} is not a dead knob" for n in sorted(VALIDATION_ONLY_KNOBS)
                  if n in live or n not in declared]


def undeclared_knob_violations(house):
    """Only declared knobs, properties and methods are read from `cfg`: a typo in a rare branch is found here."""
    members = {name for c in config_classes(house) for n in own_nodes(c.body) for name in bound_names(n)}
    return [house.flag(n, f"cfg.{n.attr} is not declared in room 2") for n in house.nodes
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "cfg"
            and n.attr not in members and not n.attr.startswith("__")]


# ----------------------------------------------------------------------------------------------------------------------
# 6 and 7. The config stays out of modules, toggles are decided where objects are built
# ----------------------------------------------------------------------------------------------------------------------
def module_classes(house):
    """Classes that derive from torch.nn, directly or through another class of the file."""
    found, grew = {}, True
    while grew:
        bases = {c.name: [ast.unparse(b) for b in c.bases] for c in house.classes}
        new = {c.name: c for c in house.classes if c.name not in found and any(
            b in found or re.search(r"^(torch\.)?nn\.|(^|\.)Module$", b) for b in bases[c.name])}
        found.update(new)
        grew = bool(new)
    return list(found.values())


def config_lookup_violations(house):
    """No dynamic reads of the config outside room 2 (which must walk over its fields to print and hash them)."""
    bad = []
    for node in [n for n in house.nodes if house.room(getattr(n, "lineno", 0)) != 2]:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args and is_config(node.args[0]):
            if node.func.id in ("getattr", "hasattr", "setattr"):
                bad.append(house.flag(node, f"{node.func.id}({ast.unparse(node.args[0])}, ...)"))
        if isinstance(node, ast.Attribute) and node.attr == "__dict__" and is_config(node.value):
            bad.append(house.flag(node, "reads the config's __dict__"))
    return bad


def stored_config_violations(house):
    """No nn.Module keeps the config, under any name."""
    bad = []
    for cls in module_classes(house):
        for node in [n for n in ast.walk(cls) if isinstance(n, (ast.Assign, ast.AnnAssign)) and n.value]:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            stored = [t for target in targets for t in ast.walk(target) if isinstance(t, ast.Attribute)
                      and isinstance(t.value, ast.Name) and t.value.id == "self"]
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            whole = any(is_config(v) and getattr(v, "id", "") != "c" for v in values)
            if stored and (whole or any(t.attr in ("cfg", "config") for t in stored)):
                bad.append(house.flag(node, f"module {cls.name} stores the whole config"))
    return bad


def forwards(house):
    return [f for f in house.functions if f.name == "forward"]


def forward_config_violations(house):
    """No forward reads the config; a bare `c` counts only with a knob's name, since tensors are called c too."""
    bad, declared = [], knobs(house)
    for node in [n for f in forwards(house) for n in ast.walk(f) if isinstance(n, ast.Attribute)]:
        short = isinstance(node.value, ast.Name) and node.value.id == "c"
        if is_config(node.value) and (not short or node.attr in declared):
            bad.append(house.flag(node, f"forward reads {ast.unparse(node)}"))
    return bad


def forward_enum_violations(house):
    """No forward compares with a string, in a tuple or a match statement either."""
    bad = []
    for node in [n for f in forwards(house) for n in ast.walk(f)]:
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            sides += [e for s in sides if isinstance(s, (ast.Tuple, ast.List, ast.Set)) for e in s.elts]
            if any(map(is_text, sides)):
                bad.append(house.flag(node, f"forward compares with a string: {ast.unparse(node)}"))
        if isinstance(node, ast.MatchValue) and is_text(node.value):
            bad.append(house.flag(node, f"forward matches a string: {ast.unparse(node)}"))
    return bad


# ----------------------------------------------------------------------------------------------------------------------
# 8 and 9. Docstrings, import without side effects, no machine paths
# ----------------------------------------------------------------------------------------------------------------------
def docstring_violations(house):
    """Public top-level functions, classes, and their public methods have docstrings once they exceed 5 lines."""
    top = [n for n in own_nodes(house.tree.body) if isinstance(n, (*FUNCTIONS, ast.ClassDef))]
    public = [n for n in top if not n.name.startswith("_")]
    methods = [m for c in public if isinstance(c, ast.ClassDef) for m in c.body if isinstance(m, FUNCTIONS)]
    public += [m for m in methods if not m.name.startswith("_")]
    return [house.flag(n, f"{n.name} has no docstring") for n in public
            if length(n) > 5 and not ast.get_docstring(n)]


def import_time(nodes):
    """Nodes that run on import: class bodies, decorators and defaults do, function bodies and the main guard do not."""
    for node in nodes:
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue
        yield node
        if isinstance(node, FUNCTIONS):
            run = [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
            yield from import_time(run)
        elif not isinstance(node, ast.Lambda):
            yield from import_time(ast.iter_child_nodes(node))


def called_name(call):
    """Last part of the called name: `from_env` of `Config.from_env()`."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)


def environment_readers(house):
    """Names of functions that touch os.environ, directly or through functions of this file."""
    touching = {id(n) for n, name in house.uses if re.match(r"os\.(environ|getenv|putenv|unsetenv)", name)}
    inside = {f.name: list(ast.walk(f)) for f in house.functions}
    readers = {name for name, nodes in inside.items() if any(id(n) in touching for n in nodes)}
    grew = True
    while grew:
        new = {name for name, nodes in inside.items() if name not in readers
               and any(isinstance(n, ast.Call) and called_name(n) in readers for n in nodes)}
        readers, grew = readers | new, bool(new)
    return readers


def import_environment_violations(house):
    """Importing the file calls nothing that touches the environment; direct uses are the monopoly rule's business."""
    readers, own = environment_readers(house), {name for name, _, _ in house.bindings}
    calls = [n for n in import_time(house.tree.body) if isinstance(n, ast.Call) and called_name(n) in readers]
    return [house.flag(n, f"import calls {ast.unparse(n.func)}, which touches os.environ") for n in calls
            if getattr(root_name(n.func), "id", None) in own and house.room(n.lineno) != 2]


def machine_path_violations(house):
    """No path of somebody's machine, in code, strings or comments."""
    return [house.flag(i, f"machine path {m[0]}") for i, line in enumerate(house.lines, 1)
            for m in [MACHINE_PATH.search(line)] if m]


# ----------------------------------------------------------------------------------------------------------------------
# The tests on train_gpt.py
# ----------------------------------------------------------------------------------------------------------------------
RULES = [
    room_violations, upward_violations, global_value_violations, rebinding_violations, shadowing_import_violations, mutation_violations,
    name_monopoly_violations, text_file_violations, hardware_violations, parameter_string_violations, size_violations,
    comment_violations, knob_declaration_violations, dead_knob_violations, undeclared_knob_violations,
    config_lookup_violations, stored_config_violations, forward_config_violations, forward_enum_violations,
    docstring_violations, import_environment_violations, machine_path_violations,
]
by_name = {"ids": lambda rule: rule.__name__.removesuffix("_violations")}


@pytest.fixture(scope="module")
def train_gpt():
    """The repository's train_gpt.py, parsed once."""
    if not TRAIN_GPT.exists():
        pytest.skip(f"{TRAIN_GPT} does not exist yet")
    return House(TRAIN_GPT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_train_gpt_keeps(rule, train_gpt):
    # A chain such as os.environ.get holds several nodes on one line: report it once.
    bad = list(dict.fromkeys(rule(train_gpt)))
    if bad:
        pytest.fail(f"{len(bad)} violation(s): {rule.__doc__}\n  " + "\n  ".join(bad), pytrace=False)


# ----------------------------------------------------------------------------------------------------------------------
# Planted houses: every rule must flag exactly the lines marked BAD
# ----------------------------------------------------------------------------------------------------------------------
DASHES = "# " + "-" * 118
TITLES = ("IMPORTS AND SOURCE SNAPSHOT|CONFIG|RUNTIME|TOKENIZER AND BYTES|DATA|KERNELS|LAYERS|MODEL|PARAMETER TABLE|"
          "OPTIMISERS, SCHEDULES & CO|WEIGHT AVERAGING|QUANTISATION|ARTIFACT|N-GRAM EXPERTS|SCORING|ADAPTATION|TRAINING-LOOP|"
          "SAMPLING|MAIN").split("|")


def banner(number, title, promise="what this room promises"):
    return f"{DASHES}\n# {number}. {title} - {promise}\n{DASHES}\n"


def build(rooms):
    """Source of a house with all rooms, furnished with {room: code}."""
    parts = [banner(n, t) + textwrap.dedent(rooms.get(n, "")) for n, t in enumerate(TITLES, 1)]
    return '"""A planted house."""\n' + "\n".join(parts)


def flagged_lines(violations):
    return {int(m[1]) for m in (re.search(r" line (\d+): ", v) for v in violations) if m}


def marked_lines(source):
    return {i for i, line in enumerate(source.splitlines(), 1) if "# BAD" in line}


CONFIG = '''
    class Shape:
        width: int = knob(512, "wider is slower")
        gate: str = knob("none", "which gate")

    class Config(Shape):
        seed: int = knob(1, "the seed")
'''
# (rule, {room: code}); code without a BAD mark is a house that the rule must leave alone.
PLANTS = [
    # -- define before use
    (upward_violations, {3: '''
        def f():
            return g()  # BAD
    ''', 5: '''
        def g():
            return f()
    '''}),
    (upward_violations, {6: '''
        X = LIMIT  # BAD
    ''', 7: '''
        LIMIT = 3
    '''}),
    (upward_violations, {6: '''
        @wrap(Model)  # BAD
        def f(x=LATER):  # BAD
            pass
    ''', 8: '''
        class Model: pass
        LATER = 1
    '''}),
    (upward_violations, {6: '''
        def f():
            for i in range(3):
                yield [k(i) for j in range(i)]  # BAD
    ''', 8: '''
        def k(i): pass
    '''}),
    (upward_violations, {6: '''
        class A:
            scan = 1
            def f(self):
                return scan  # BAD
    ''', 8: '''
        def scan(): pass
    '''}),
    # ... annotations, locals, arguments, comprehension variables, attributes and uses from below are in order
    (upward_violations, {3: '''
        def f(m: Model, scan, *k) -> Model:
            x: Model = scan + [g for g in k]
            return x.g
    ''', 8: '''
        class Model: pass
        def scan(): return f(1, 2)
        def g(): pass
    '''}),
    (upward_violations, {3: '''
        def f():
            scan = 1
            return lambda g: g + scan
    ''', 8: '''
        def scan(): pass
        def g(): pass
    '''}),
    # -- mutable globals
    (global_value_violations, {5: '''
        cache = {}  # BAD
        log = open_log()  # BAD
        seen: set = set()  # BAD
    '''}),
    (global_value_violations, {5: '''
        if HAVE:
            pool = [1]  # BAD
    '''}),
    (global_value_violations, {5: '''
        a = b = (1, [2])  # BAD
    '''}),
    (global_value_violations, {5: '''
        CACHE = {}
        _TABLE = list('ab')
        __all__ = ['f']
        eps = 1e-6
        Tensor = torch.Tensor
        Row = namedtuple('Row', ['a'])
        def f():
            cache = {}
            return cache
    '''}),
    (rebinding_violations, {5: '''
        count = 0
        def f():
            global count  # BAD
            count += 1
    '''}),
    (rebinding_violations, {5: '''
        N = 1
    ''', 7: '''
        N += 1  # BAD
    '''}),
    (rebinding_violations, {5: '''
        def f(): pass
    ''', 7: '''
        if 1:
            def f(): pass  # BAD
    '''}),
    (rebinding_violations, {1: '''
        try:
            import triton
        except ImportError:
            triton = None
        HAVE = {}
        if 1:
            def f(): pass
        else:
            def f(): pass
    ''', 3: '''
        def g():
            global HAVE
            HAVE = 1
            N = 1
            N = 2
    '''}),
    (mutation_violations, {5: '''
        SEEN = {}
        def f():
            SEEN['a'] = 1  # BAD
            del SEEN['a']  # BAD
            SEEN.update(b=1)  # BAD
            SEEN['a'].append(1)  # BAD
            SEEN['n'] += 1  # BAD
    '''}),
    (mutation_violations, {5: '''
        class Log:
            n = 0
            lines = []
        def f():
            Log.n += 1  # BAD
            Log.lines.append(1)  # BAD
            setattr(Log, 'n', 1)  # BAD
            f.calls = 1  # BAD
    '''}),
    (mutation_violations, {5: '''
        TABLE = []
        TABLE.append(1)  # BAD
    '''}),
    (mutation_violations, {1: '''
        import torch
        HAVE = {}
        HAVE['x'] = 1
        torch.backends.cudnn.benchmark = True
    ''', 5: '''
        TABLE = {}
        class Ema:
            def update(self, TABLE):
                TABLE['a'] = self.n = 1
        def f(x):
            HAVE['y'] = 0
            Ema.update(x)
            x.a.append(TABLE.get('k'))
    '''}),
    # -- monopolies
    (name_monopoly_violations, {1: '''
        import os, sys
        from os import environ as e
    ''', 5: '''
        def f():
            return os.environ.get('A'), 1  # BAD
        def g():
            e['B'] = '1'  # BAD
            return os.getenv('C')  # BAD
    '''}),
    (name_monopoly_violations, {1: '''
        import os
        os.environ['A'] = '1'  # BAD
    ''', 2: '''
        A = os.environ.get('A')
    '''}),
    (name_monopoly_violations, {5: '''
        def f(x, log=print):  # BAD
            print(x)  # BAD
    ''', 3: '''
        print(1)
    '''}),
    (name_monopoly_violations, {1: '''
        import sys
    ''', 5: '''
        sys.stderr.write('x')  # BAD
    '''}),
    (name_monopoly_violations, {1: '''
        import time
        from time import perf_counter as now
    ''', 3: '''
        T0 = time.time()
    ''', 15: '''
        def f():
            a = time.perf_counter()  # BAD
            return a - now()  # BAD
    '''}),
    (name_monopoly_violations, {15: '''
        def f():
            import time as t
            return t.monotonic()  # BAD
    '''}),
    (name_monopoly_violations, {1: '''
        import brotli, zlib
    ''', 13: '''
        def f(b):
            import lzma
            return brotli.compress(b)
    ''', 12: '''
        def f(b):
            import zstandard  # BAD
            return zlib.crc32(b)  # BAD
    '''}),
    (name_monopoly_violations, {1: '''
        import importlib
    ''', 5: '''
        B = importlib.import_module('brotli')  # BAD
    '''}),
    (name_monopoly_violations, {1: '''
        import sentencepiece as spm
    ''', 4: '''
        SP = spm.SentencePieceProcessor
    ''', 16: '''
        def f():
            return spm.SentencePieceProcessor()  # BAD
    '''}),
    (name_monopoly_violations, {1: '''
        import torch
        OK = torch.cuda.is_available()
    ''', 6: '''
        torch.cuda.get_device_capability()
    ''', 14: '''
        if torch.cuda.is_available():  # BAD
            torch.cuda.synchronize()
        C = torch.cuda.get_device_capability(0)  # BAD
    '''}),
    (name_monopoly_violations, {1: '''
        import os, time
    ''', 5: '''
        def f(time, p):
            p.print(time.view(1), os.path.sep)
    '''}),
    (text_file_violations, {5: '''
        open('log.txt', 'a')  # BAD
        open('x', mode='w')  # BAD
        p.open('w+')  # BAD
        p.write_text('x')  # BAD
        open(p)
        open(p, 'rb')
        open('w')  # BAD
    '''}),
    (text_file_violations, {3: '''
        open('log.txt', 'a')
    ''', 13: '''
        open('m.bin', 'wb')
        p.write_bytes(b'')
    '''}),
    (hardware_violations, {7: '''
        if HAVE['triton']:  # BAD
            pass
        F = HAVE.get('triton')  # BAD
        G = 1 if x.is_cuda else 0  # BAD
        H = device.type == 'cuda'  # BAD
    '''}),
    (hardware_violations, {6: '''
        F = HAVE['triton'] or HAVE['cuda']
    ''', 3: '''
        G = d.type == 'cuda' and x.is_cuda
    ''', 13: '''
        Z = HAVE['zstd'] and HAVE.get('brotli') and HAVE[key]
    ''', 17: '''
        log(HAVE)
        x = t.to('cuda')
        I = HAVE.items()
    '''}),
    (parameter_string_violations, {12: r'''
        def f(n, i):
            a = n.startswith('blocks.')  # BAD
            b = n.endswith('.weight')  # BAD
            c = n == 'tok_emb'  # BAD
            d = re.match(r'blocks\.\d+\.', n)  # BAD
            return sd[f'blocks.{i}.x']  # BAD
    '''}),
    (parameter_string_violations, {7: '''
        class A(nn.Module):
            def __init__(self):
                self.gate = nn.Linear(1, 1)
                self.skip_w, x = nn.Parameter(z), 1
                self.skip_v = nn.Parameter(z)
                self.register_buffer('cos_table', z)
    ''', 10: '''
        A = 'skip_v'  # BAD
        B = 'attn.gate'  # BAD
        C = 'gate'
        D = 'cos_table'  # BAD
    '''}),
    (parameter_string_violations, {9: '''
        ROWS = [('blocks.', 'tok_emb', '.weight')]
    ''', 2: '''
        X = knob(1, "rate of the tok_emb and blocks. of .weight")
    ''', 7: '''
        def f():
            "blocks.0.weight"
            return f"bad blocks. {f}", "tok_emb_lr", "layers"
    '''}),
    # -- size: planted below, since these need many lines; here only what must pass
    (size_violations, {7: '''
        def f():
            x = 1
            x = 1
            x = 1
            x = 1
            x = 1
            x = 1
            x = 1
            x = 1
            x = 1
            x = 1
            x = 1
            x = 1
    '''}),
    # -- knobs
    (knob_declaration_violations, {2: '''
        class Shape:
            width: int = knob(512, "wider is slower")
            gate: str = knob("none", "which gate")

        class Config(Shape):
            seed: int = knob(1, "the seed")
            lr: float = 0.1  # BAD
            gate: str = knob('a', 'b')  # BAD
            KINDS: ClassVar[int] = 1
    '''}),
    (dead_knob_violations, {2: '''
        class Shape:
            width: int = knob(512, 'wide')
            gate: str = knob('n', 'gate')  # BAD
        class Config(Shape):
            seed: int = knob(1, 'seed')
            heads: int = knob(1, 'h')
            a: int = knob(1, 'a')
            b: int = knob(1, 'b')  # BAD
            d: int = knob(1, 'd')  # BAD
            @property
            def live(self): return self.half
            @functools.cached_property
            def half(self): return self._helper() + self.a
            def _helper(self): return self.heads
            @property
            def dead(self): return self.b
            def validate(self): assert self.gate and self.dead
    ''', 5: '''
        def f(cfg, self, x):
            cfg.validate()
            x.gate = x.d
            cfg.d = 1
            return cfg.seed + self.cfg.width + cfg.live
    '''}),
    (undeclared_knob_violations, {2: '''
        class Shape:
            width: int = knob(512, "wider is slower")
            gate: str = knob("none", "which gate")

        class Config(Shape):
            seed: int = knob(1, "the seed")
            @property
            def half(self): return self.width
    ''', 5: '''
        def f(cfg):
            return cfg.width, cfg.half, cfg.seed
        def g(cfg):
            return cfg.widht  # BAD
    '''}),
    # -- the config stays out of modules
    (config_lookup_violations, {5: '''
        def f(cfg, self):
            a = getattr(cfg, 'x', 1)  # BAD
            b = hasattr(self.cfg, 'y')  # BAD
            d = cfg.__dict__  # BAD
            return getattr(self, 'x'), cfg.x
    '''}),
    (config_lookup_violations, {2: '''
        def show(cfg):
            return [getattr(cfg, f) for f in fields(cfg)]
    '''}),
    (stored_config_violations, {7: '''
        class A(nn.Module):
            def __init__(self, cfg):
                self.cfg = cfg  # BAD
                self.width = cfg.width
    ''', 8: '''
        class B(A):
            def __init__(self, cfg):
                self.opts, self.n = cfg, 1  # BAD
        class L(torch.nn.Linear):
            def __init__(self, c):
                self.config = dict(c)  # BAD
    ''', 15: '''
        class Run:
            def __init__(self, cfg):
                self.cfg = cfg
    '''}),
    (forward_config_violations, {2: '''
        class Shape:
            width: int = knob(512, "wider is slower")
            gate: str = knob("none", "which gate")

        class Config(Shape):
            seed: int = knob(1, "the seed")
    ''', 7: '''
        class A(nn.Module):
            def forward(self, x, cfg, c):
                if cfg.gate:  # BAD
                    x = x * self.cfg.width  # BAD
                return x * c.width + c.size  # BAD
            def __init__(self, cfg):
                self.w = cfg.width
    '''}),
    (forward_enum_violations, {7: '''
        class A(nn.Module):
            def forward(self, x):
                if self.gate == 'dense':  # BAD
                    return 1
                y = self.mode in ('a', 'b')  # BAD
                match self.kind:
                    case 'mean':  # BAD
                        return 2
                return x if self.gate is not None and x.ndim == 3 else y
            def build(self, cfg):
                return cfg.gate == 'dense'
    '''}),
    # -- docstrings
    (docstring_violations, {7: '''
        def f():  # BAD
            x = 1
            x = 1
            x = 1
            x = 1
            x = 1
        def g():
            'says why'
            x = 1
            x = 1
            x = 1
            x = 1
            x = 1
        def short():
            return 1
        def _private():
            x = 1
            x = 1
            x = 1
            x = 1
            x = 1
            x = 1
            x = 1
            x = 1
            x = 1
    '''}),
    (docstring_violations, {7: '''
        class A:  # BAD
            def m(self):  # BAD
                x = 1
                x = 1
                x = 1
                x = 1
                x = 1
            def __init__(self):
                x = 1
                x = 1
                x = 1
                x = 1
                x = 1
        class B:
            x = 1
        if 1:
            def nested():  # BAD
                x = 1
                x = 1
                x = 1
                x = 1
                x = 1
    '''}),
    # -- import
    (shadowing_import_violations, {1: '''
        import torch
        import torch.nn.functional
        try:
            import zlib
        except ImportError:
            zlib = None
    ''', 3: '''
        def connect(gpu):
            if gpu:
                torch.cuda.set_device(0)
            import torch.distributed  # BAD
            import triton.language as tl
        def pack():
            from own import zlib  # BAD
            import zlib as z
    '''}),
    (import_environment_violations, {1: '''
        import os
    ''', 2: '''
        class Config:
            @classmethod
            def from_env(cls):
                return cls(os.environ)
        def load():
            return Config.from_env()
    ''', 3: '''
        CFG = Config.from_env()  # BAD
        if 1:
            load()  # BAD
        def f(x=load()):  # BAD
            return load()
    ''', 17: '''
        def main():
            load()
        if __name__ == '__main__':
            load()
    '''}),
    (machine_path_violations, {5: '''
        # as in /root/x  # BAD
        A = '/work/main'  # BAD
        B = '/tmp/a'  # BAD
        C = 'data/tmp/x and threads/workers, /rooted'
    '''}),
]


@pytest.mark.parametrize("rule, rooms", PLANTS, ids=[f"{r.__name__}-{i}" for i, (r, _) in enumerate(PLANTS)])
def test_rule_flags_exactly_the_marked_lines(rule, rooms):
    source = build(rooms)
    violations = rule(House(source))
    numbered = [f"{i:4} {line}" for i, line in enumerate(source.splitlines(), 1) if not line.startswith("# ---")]
    assert flagged_lines(violations) == marked_lines(source), "\n".join([*numbered, *violations])


def test_violations_are_readable():
    source = build({7: "class A(nn.Module):\n    def forward(self, x, cfg):\n        return cfg.xsa_last_n\n"})
    line = source.splitlines().index("        return cfg.xsa_last_n") + 1
    assert forward_config_violations(House(source)) == [f"room 7 line {line}: forward reads cfg.xsa_last_n"]


GOOD = build({})
ROOM_6, ROOM_7 = banner(6, "KERNELS"), banner(7, "LAYERS")
BROKEN_ROOMS = {
    "missing": (GOOD.replace(ROOM_6, ""), "room 6: there is no banner"),
    "swapped": (GOOD.replace(ROOM_6, "@").replace(ROOM_7, ROOM_6).replace("@", ROOM_7), "banner 6 follows banner 7"),
    "twice": (GOOD.replace(ROOM_7, ROOM_6 + ROOM_7), "banner 6 follows banner 6"),
    "one too many": (GOOD + "\n" + banner(ROOMS + 1, "EXTRA"), f"banner {ROOMS + 1} follows banner {ROOMS}"),
    "no contract": (GOOD.replace(ROOM_6, banner(6, "KERNELS", "")), "the banner has no contract"),
    "not closed": (GOOD.replace(ROOM_6, "\n".join(ROOM_6.splitlines()[:2]) + "\n\n"), "no ruler closes the banner"),
    "not ruled": (GOOD.replace(ROOM_6, "\n".join(ROOM_6.splitlines()[1:]) + "\n"), "not a banner of the form"),
    "lower case": (GOOD.replace(ROOM_6, banner(6, "Kernels")), "not a banner of the form"),
    "no docstring": (GOOD.replace('"""A planted house."""', ""), "room 0: there is no module docstring"),
    "early code": (GOOD.replace('"""A planted house."""', '"""A house."""\nX = 1'), "line 2: code above the first"),
    "in a string": (GOOD.replace(ROOM_6, f'S = """\n{ROOM_6}"""\n'), "room 6: there is no banner"),
}


@pytest.mark.parametrize("source, expected", BROKEN_ROOMS.values(), ids=BROKEN_ROOMS)
def test_broken_rooms_are_found(source, expected):
    assert any(expected in v for v in room_violations(House(source))), room_violations(House(source))


def test_sound_rooms_pass():
    longer = banner(6, "KERNELS", "a contract of\n# several lines,\n# with a list: 1. eager 2. fused")
    assert room_violations(House(GOOD)) == room_violations(House(GOOD.replace(ROOM_6, longer))) == []


def function(name, lines):
    return f"def {name}():\n" + "    x = 1\n" * (lines - 1)


# Each is one step over a limit; the same house one step smaller must pass.
SIZES = {
    "function": (lambda more: function("f", MAX_FUNCTION + more) + function("g", 2) * 2, "f has 61 lines"),
    "class": (lambda more: "class A:\n" + "    x = 1\n" * (MAX_CLASS - 1 + more), "A has 151 lines"),
    "file": (lambda more: "x = 1\n# why\n\n" * (MAX_FILE + more), f"file: {MAX_FILE + 1} lines of code"),
    "median": (lambda more: function("f", 2) + function("g", MAX_MEDIAN + more) + function("h", 40), "has 15 lines"),
}


@pytest.mark.parametrize("code, expected", SIZES.values(), ids=SIZES)
def test_sizes_at_and_over_the_limit(code, expected):
    assert size_violations(House(build({7: code(0)}))) == []
    found = size_violations(House(build({7: code(1)})))
    assert len(found) == 1 and expected in found[0]


@pytest.mark.parametrize("comments, enough", [(11, False), (12, True)])
def test_comment_rate_counts_comments_and_not_rulers_pragmas_or_docstrings(comments, enough):
    inline, padding = "x = 1  # why\n" * 6, f"{DASHES}\n#\n# noqa\ny = '# no comment'\n\n"
    own_line = "# because\n" * (comments - 6)
    source = '"""Doc.\n# not a comment\n"""\n' + inline + own_line + padding + "z = 2\n" * 93
    assert (comment_violations(House(source)) == []) is enough


def test_a_house_without_config_and_an_idle_excuse_are_found(monkeypatch):
    assert knob_declaration_violations(House(GOOD)) == ["room 2: no class Config with knobs"]
    monkeypatch.setitem(globals(), "VALIDATION_ONLY_KNOBS", {"seed", "gone"})
    found = dead_knob_violations(House(build({2: CONFIG, 5: "def f(cfg):\n    return cfg.width, cfg.gate\n"})))
    assert found == ["VALIDATION_ONLY_KNOBS: gone is not a dead knob"]  # seed is dead, and so excused


def test_every_rule_can_fail():
    planted = {rule for rule, rooms in PLANTS if marked_lines(build(rooms))}
    elsewhere = {room_violations, size_violations, comment_violations}  # planted in the tests just above
    assert planted | elsewhere == set(RULES)


# A small house that keeps every rule: the whole list must be silent on code as it is meant to be written.
TIDY = {
    1: '''
        from __future__ import annotations
        import os
        import time
        from dataclasses import dataclass, field
        import torch
        from torch import nn
        try:
            import brotli  # optional: the packer falls back to lzma
        except ImportError:
            brotli = None
        HAVE = {"brotli": brotli is not None, "cuda": torch.cuda.is_available()}
    ''',
    2: '''
        def knob(default, help, choices=None):
            return field(default=default, metadata={"help": help, "choices": choices})

        @dataclass
        class Shape:
            width: int = knob(512, "wider learns more per step and steps slower")
            heads: int = knob(8, "more heads are narrower")
            gate: str = knob("none", "gate on the attention output", ("none", "dense"))

        @dataclass
        class Config(Shape):
            """All knobs."""
            @property
            def head_dim(self):
                return self.width // self.heads

            @classmethod
            def from_env(cls):
                return cls(**{k.lower(): v for k, v in os.environ.items()})
    ''',
    3: '''
        class Log:
            """One log per run."""
            def __init__(self):
                self.start = time.perf_counter()

            def say(self, text):
                print(f"{time.perf_counter() - self.start:.1f} {text}")
    ''',
    6: '''
        def attend(q, k, v):
            # the eager reference is what the fused kernel is tested against
            return fused(q, k, v) if HAVE["cuda"] else q @ k @ v

        def fused(q, k, v):
            return q @ k @ v
    ''',
    7: '''
        class Attention(nn.Module):
            """x_BTD -> y_BTD."""
            def __init__(self, cfg: Config):
                super().__init__()
                self.c_q = nn.Linear(cfg.width, cfg.head_dim)
                # built or absent: forward asks the object, never the config
                self.gate = nn.Linear(cfg.width, 1) if cfg.gate == "dense" else None

            def forward(self, x_BTD):
                y = attend(self.c_q(x_BTD), x_BTD, x_BTD)
                return y if self.gate is None else y * self.gate(x_BTD)
    ''',
    9: '''
        ROWS = ((r"c_q\\.weight$", "matrix"), (r"gate\\.", "scalar"))
    ''',
    17: '''
        def main(cfg):
            Log().say(f"gate {cfg.gate}, {len(ROWS)} rows, brotli {HAVE['brotli']}, {Attention(cfg)}")

        if __name__ == "__main__":
            main(Config.from_env())
    ''',
}


@pytest.mark.parametrize("rule", RULES, **by_name)
def test_a_tidy_house_keeps(rule):
    assert rule(House(build(TIDY))) == []
