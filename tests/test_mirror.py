"""The packages mirror each other and keep the rules of the house; read, not imported."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
from cases import CASES

ROOT = Path(__file__).resolve().parent.parent
PYRO, NUMPYRO = "pyro_vae_ext", "numpyro_vae_ext"
PACKAGES = (PYRO, NUMPYRO)

# What one host needs and the other has no word for.
OWN_ARGUMENTS = {
    # `svi` of a checkpoint: NumPyro saves the state of one.
    PYRO: {"max_plate_nesting", "compile", "backend", "svi"},
    NUMPYRO: {
        "rngs",
        "param_dtype",
        "rng_key",
        "params",
        "param_map",
        "prefix",
        "init_state",
        "resident",
        "svi",
        "svi_state",
    },
}
# What one host has to do by itself: in Pyro tracing, updates and the undoing of steps, in NumPyro
# programs of many steps, and the threads of JAX.
OWN_FILES = {
    PYRO: {
        f"training/_{name}.py"
        for name in ("effects", "graph", "products", "state", "steps", "update")
    },
    NUMPYRO: {"_threads.py", "training/_feeds.py"},
}
# Files that know neither torch nor JAX: one text in both packages, which is tested once.
SAME_FILES = (
    "_psis.py",
    "diagnostics/_groups.py",
    "diagnostics/_importance.py",
    "diagnostics/_report.py",
    "training/_course.py",
    "training/_diagnosis.py",
    "training/_lbfgs.py",
    "training/_normals.py",
    "training/_paths.py",
    "training/history.py",
    "training/posterior_history.py",
)
# A module's call is `forward` for torch.
ALIASES = {PYRO: {"forward": "__call__"}, NUMPYRO: {}}
# What a host's own inference engine calls; each host has its own list.
HOST_CONTRACT = {"loss", "loss_and_grads", "differentiable_loss", "loss_with_mutable_state"}
# What is stepped, and the state of it, is the host's own: an SVI that is compiled has its methods.
HOST_CONTRACT |= {"evaluate", "init", "get_params", "reset", "run", "step", "update"}
# The bijection of a guide, for the host's NeuTra: of parameters in one host, of arguments in the
# other.
HOST_CONTRACT |= {"get_base_dist", "get_posterior", "get_transform"}
# So with a distribution's methods, which one host may have ready-made.
DISTRIBUTION_CONTRACT = {"entropy", "enumerate_support", "expand", "log_prob", "sample"}
# The sections that a public docstring must have, by family.
SECTIONS = {
    "guides": ("Args", "Raises", "References", "Example"),
    "elbos": ("Args", "Raises", "References", "Example"),
    "nn": ("Args", "Raises", "References", "Example"),
    "diagnostics": ("Args", "Returns", "Raises", "Example"),
    "distributions": ("Args", "Raises", "References", "Example"),
    "handlers": ("Args", "Raises", "References", "Example"),
    "likelihoods": ("Args", "Raises", "References", "Example"),
    "priors": ("Args", "Raises", "References", "Example"),
    "training": ("Args", "Raises", "Example"),
}
# Classes that functions return: their users build none.
RESULTS = {
    "History": ("Attributes", "Example"),
    "PosteriorHistory": ("Attributes", "Example"),
}
# A family's private modules may know a member that knows nothing of the package itself.
LEAVES = {"training.history", "training.posterior_history"}
# Errors about what only one host has, or lets through.
OWN_ERRORS = {
    PYRO: {
        "Expected a program that a handler can wrap",
        "Expected one site of each name",
        "Expected shape {} for the parameter '{}.{}'",
        "Expected values on the simplex at OneHotCategorical.log_prob",
        # Tracing a step into one graph.
        "Expected a step that a CUDA graph can hold",
        "Expected a step that traces into one graph",
        "Expected an objective with one loss",
        "Expected arguments that repeat",
        "Expected inductor to compile the step",
        # Pyro's store, which knows parameters and not modules; pickles are not loaded.
        "Expected modules to be registered before a checkpoint is loaded",
        "Expected numbers, strings and tensors in the state of a checkpoint",
    },
    NUMPYRO: {
        "Expected rngs for a family with a context",
        "Expected num_importance outside of jit",
        # Deterministic sites are among the answers, as the host has it.
        "Expected the arguments of the model, on which deterministic sites, supports or plates "
        "may depend",
        "Expected rng_key for the samples behind log_prob of {}",
    },
}
MAX_LINES = 400
# Running a host's trace and reading it: the business of _trace.py and _record.py alone.
TRACE_NAMES = {
    "Trace",
    "compute_log_prob",
    "get_importance_trace",
    "get_trace",
    "log_density",
    "trace",
}
TRACE_OWNERS = {"handlers", "poutine", "pyro", "numpyro", "infer", "util", "enum"}


def files(package: str) -> list[str]:
    root = ROOT / package
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def public_names(package: str, family: str) -> list[str]:
    for node in parse(ROOT / package / family / "__init__.py").body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{package}/{family}/__init__.py has no literal __all__")


def families(package: str) -> list[str]:
    return sorted(path.parent.name for path in (ROOT / package).glob("*/__init__.py"))


def definitions(package: str, family: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """The nodes of the public members of a family, by name."""
    names = public_names(package, family)
    found = {}
    for path in sorted((ROOT / package / family).glob("*.py")):
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in names:
                found[node.name] = node
    return found


def signature(function: ast.FunctionDef, package: str) -> list[tuple[str, str, str | None]]:
    """(kind, name, default) of every argument that the other host has as well."""
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(positional) - len(spec.defaults)) + list(spec.defaults)
    rows = [("positional", a.arg, d) for a, d in zip(positional, defaults, strict=True)]
    rows += [("variadic", f"*{spec.vararg.arg}", None)] if spec.vararg else []
    rows += [("keyword", a.arg, d) for a, d in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)]
    rows += [("variadic", f"**{spec.kwarg.arg}", None)] if spec.kwarg else []
    return [
        (kind, name, None if default is None else ast.unparse(default))
        for kind, name, default in rows
        if name not in OWN_ARGUMENTS[package]
    ]


def is_property(function: ast.FunctionDef) -> bool:
    names = {ast.unparse(item).split(".")[-1] for item in function.decorator_list}
    return bool(names & {"property", "cached_property", "lazy_property"})


def family_bases(package: str, family: str) -> dict[str, ast.ClassDef]:
    """The classes that the private files of a family define, by name."""
    nodes = [n for path in (ROOT / package / family).glob("_[a-z]*.py") for n in parse(path).body]
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def public_signatures(
    node: ast.ClassDef | ast.FunctionDef, package: str, family: str
) -> dict[str, list]:
    """Signatures of a function, or of a class's public methods, inherited ones included.

    One host may inherit what the other writes out, and a property is an attribute elsewhere:
    neither is a difference to the user.
    """
    if isinstance(node, ast.FunctionDef):
        return {node.name: signature(node, package)}
    bases = family_bases(package, family)
    found: dict[str, list] = {}
    for base in node.bases:
        name = ast.unparse(base).split("[")[0]
        if name in bases and bases[name] is not node:
            found |= public_signatures(bases[name], package, family)
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and not is_property(item):
            name = ALIASES[package].get(item.name, item.name)
            if not name.startswith("_") or name in ("__init__", "__call__"):
                found[name] = signature(item, package)
    hosts = HOST_CONTRACT | (DISTRIBUTION_CONTRACT if family == "distributions" else set())
    return {key: row for key, row in found.items() if key not in hosts}


def imports(package: str, file: str) -> list[tuple[str, str | None]]:
    """(module, name) of every import of the package's own modules; name None for `import m`."""
    here = [package, *Path(file).parent.parts]
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(parse(ROOT / package / file)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(module, alias.name) for alias in node.names]
    return [row for row in found if row[0].split(".")[0] == package]


def all_files() -> list[pytest.param]:
    return [
        pytest.param(package, file, id=f"{package}/{file}")
        for package in PACKAGES
        for file in files(package)
    ]


def all_members() -> list[pytest.param]:
    return [
        pytest.param(package, family, name, id=f"{package}.{family}.{name}")
        for package in PACKAGES
        for family in families(package)
        for name in public_names(package, family)
    ]


def test_same_tree_of_files() -> None:
    ours, theirs = set(files(PYRO)), set(files(NUMPYRO))
    assert ours - theirs == OWN_FILES[PYRO]
    assert theirs - ours == OWN_FILES[NUMPYRO]


@pytest.mark.parametrize("file", SAME_FILES)
def test_same_text(file: str) -> None:
    ours, theirs = (
        (ROOT / package / file).read_text("utf-8").replace(f"from {package}", "from package")
        for package in PACKAGES
    )
    assert ours == theirs


@pytest.mark.parametrize("package", PACKAGES)
def test_leaves_know_nothing_of_the_package(package: str) -> None:
    assert [name for name in LEAVES if imports(package, f"{name.replace('.', '/')}.py")] == []


def test_registry_has_every_family() -> None:
    assert set(CASES) == set(families(PYRO)) == set(families(NUMPYRO))


@pytest.mark.parametrize("package", PACKAGES)
def test_root_exports_the_families(package: str) -> None:
    assert sorted(public_names(package, ".")) == families(package)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("family", sorted(CASES))
def test_registry_has_every_member(package: str, family: str) -> None:
    names = public_names(package, family)
    assert names == sorted(names)
    assert set(CASES[family]) == set(names) == set(definitions(package, family))
    assert all(CASES[family].values()), "a member without a case is not tested"


@pytest.mark.parametrize("family", sorted(CASES))
def test_same_arguments_and_defaults(family: str) -> None:
    ours, theirs = definitions(PYRO, family), definitions(NUMPYRO, family)
    for name in sorted(CASES[family]):
        assert public_signatures(ours[name], PYRO, family) == public_signatures(
            theirs[name], NUMPYRO, family
        )


@pytest.mark.parametrize(("package", "family", "name"), all_members())
def test_public_docstring_has_its_sections(package: str, family: str, name: str) -> None:
    node = definitions(package, family)[name]
    text = ast.get_docstring(node)
    assert text, "no docstring"
    is_result = any(ast.unparse(base) == "NamedTuple" for base in getattr(node, "bases", ()))
    wanted = ("Attributes",) if is_result else RESULTS.get(name, SECTIONS[family])
    missing = [title for title in wanted if not re.search(rf"^{title}:$", text, re.MULTILINE)]
    assert not missing
    assert is_result or ">>> " in text, "the example is no doctest"


@pytest.mark.parametrize(("package", "family", "name"), all_members())
def test_booleans_are_keyword_only(package: str, family: str, name: str) -> None:
    """No positional booleans."""
    node = definitions(package, family)[name]
    for key, rows in public_signatures(node, package, family).items():
        for kind, argument, default in rows:
            assert kind != "positional" or default not in ("True", "False"), f"{key}: {argument}"


@pytest.mark.parametrize(("package", "file"), all_files())
def test_file_is_one_thing(package: str, file: str) -> None:
    text = (ROOT / package / file).read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES
    assert ast.get_docstring(parse(ROOT / package / file)), "no module docstring"


@pytest.mark.parametrize(("package", "file"), all_files())
def test_no_assert_on_user_input(package: str, file: str) -> None:
    lines = [n.lineno for n in ast.walk(parse(ROOT / package / file)) if isinstance(n, ast.Assert)]
    assert not lines


def import_fault(package: str, file: str, module: str, name: str | None) -> str | None:
    """Why an import is against the rules; None if it is not.

    The layers, from the bottom: private modules of the package (``_trace``, ``_checks``), ``nn``,
    a family's private modules (``_base``), its members, the ``__init__`` files.
    """
    path = Path(file)
    family = path.parts[0] if len(path.parts) > 1 else None
    target = module.split(".")[1:]
    if path.name == "__init__.py":
        if family is None:
            return None
        return None if target[:1] == [family] else "a family's __init__ exports its own members"
    if name is not None and (ROOT / package / Path(*target, name)).with_suffix(".py").exists():
        target.append(name)  # `from package.family import module`
        name = None
    if not target:
        return "a module imports the package root"
    layer = target[0]
    if layer.startswith("_"):
        return None  # a private module of the package is the lowest layer
    if family is None:
        return None if layer == "nn" else "the lowest layer imports a family"
    if family == "nn" and layer != "nn":
        return "nn imports a family"
    private_target = len(target) > 1 and target[1].startswith("_")
    if layer == family and ".".join(target) in LEAVES:
        return None
    if private_target and layer not in (family, "nn"):
        return "a module imports what is private to another family"
    if name is not None and name.startswith("_"):
        return "a module imports a private name"
    if path.name.startswith("_") and layer == family and not private_target:
        return "a family's base imports a member"
    return None


@pytest.mark.parametrize(("package", "file"), all_files())
def test_imports_point_one_way(package: str, file: str) -> None:
    faults = [
        f"{module}, {name}: {fault}"
        for module, name in imports(package, file)
        if (fault := import_fault(package, file, module, name))
    ]
    assert not faults


@pytest.mark.parametrize(("package", "file"), all_files())
def test_neither_package_imports_the_other_backend(package: str, file: str) -> None:
    strangers = {
        PYRO: {NUMPYRO, "jax", "jaxlib", "numpyro", "flax", "optax"},
        NUMPYRO: {PYRO, "torch", "pyro"},
    }[package]
    for node in ast.walk(parse(ROOT / package / file)):
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots = {str(node.module).split(".")[0]}
        else:
            continue
        assert not roots & strangers, f"line {node.lineno}"


@pytest.mark.parametrize(("package", "file"), all_files())
def test_only_trace_touches_trace_internals(package: str, file: str) -> None:
    if file in ("_trace.py", "_record.py"):
        return
    for node in ast.walk(parse(ROOT / package / file)):
        if isinstance(node, ast.Attribute) and node.attr in TRACE_NAMES:
            owner = ast.unparse(node.value).split(".")[-1]
            assert owner not in TRACE_OWNERS, f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] not in PACKAGES:
            names = {alias.name for alias in node.names} & TRACE_NAMES
            assert not names, f"line {node.lineno}: {names}"


def error_texts(package: str) -> set[str]:
    """What the package's errors expect, "Expected X", with {} for what is filled in."""
    found = set()
    for file in files(package):
        for node in ast.walk(parse(ROOT / package / file)):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "{}" for part in node.values
                ]
                text = "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            if text.startswith("Expected ") and ";" in text:
                found.add(text.split(";")[0].replace("'{}'", "{}"))
    return found


def test_same_errors() -> None:
    ours, theirs = error_texts(PYRO), error_texts(NUMPYRO)
    assert ours - theirs == OWN_ERRORS[PYRO]
    assert theirs - ours == OWN_ERRORS[NUMPYRO]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_error_is_in_the_catalogue(package: str) -> None:
    catalogue = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
    texts = error_texts(package)
    assert len(texts) > 15, "found hardly any: is the search wrong?"
    patterns = {text: re.escape(text).replace(r"\{\}", "[^;|]+?") for text in texts}
    assert [text for text, row in patterns.items() if not re.search(row + ";", catalogue)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_member_has_its_pages(package: str) -> None:
    """Every family in the API pages, every guide family and objective in the method pages."""
    api = (ROOT / "docs" / "api" / f"{package.removesuffix('_vae_ext')}.md").read_text("utf-8")
    methods = "\n".join(p.read_text("utf-8") for p in (ROOT / "docs" / "methods").glob("*.md"))
    assert [f for f in families(package) if f"{package}.{f}" not in api] == []
    for family in ("guides", "elbos"):
        assert [n for n in public_names(package, family) if n not in methods] == []


def test_rules_of_imports_reject_what_they_should() -> None:
    """The checker itself: it knows a wrong import when it sees one."""
    wrong = [
        ("guides/iaf.py", PYRO, "guides"),
        ("guides/_base.py", f"{PYRO}.guides.mean_field", "MeanField"),
        ("guides/iaf.py", f"{PYRO}.elbos._base", "x"),
        ("guides/iaf.py", f"{PYRO}.guides.mean_field", "_private"),
        ("nn/masked.py", f"{PYRO}.guides.mean_field", "MeanField"),
        ("_trace.py", f"{PYRO}.guides.mean_field", "MeanField"),
        ("guides/__init__.py", f"{PYRO}.elbos", "x"),
    ]
    right = [
        ("guides/iaf.py", f"{PYRO}.guides._base", "GuideFamily"),
        ("guides/iaf.py", f"{PYRO}.guides.mean_field", "MeanField"),
        ("guides/mean_field.py", f"{PYRO}.nn._activations", "ACTIVATIONS"),
        ("elbos/_base.py", f"{PYRO}._trace", "x"),
        ("__init__.py", PYRO, "guides"),
        ("guides/__init__.py", f"{PYRO}.guides.iaf", "IAF"),
    ]
    assert all(import_fault(PYRO, *row) for row in wrong)
    assert not any(import_fault(PYRO, *row) for row in right)
