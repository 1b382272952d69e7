"""The built libraries hold to the stable ABI of torch, and instruction set files leak no code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import alignops

PACKAGE = Path(alignops.__file__).parent
ROOT = PACKAGE.parent
LIBRARIES = sorted(PACKAGE.glob("_*.so"))
FLOOR = (2, 11)

# Functions of torch's C interface that the libraries may use, with the version that added them;
# what is older than the stable ABI itself is under 2.9.
ALLOWED = {
    (2, 9): """
        aoti_torch_abi_version aoti_torch_delete_library_object aoti_torch_delete_tensor_object
        aoti_torch_device_type_[a-z0-9]+ aoti_torch_dtype_(bool|bfloat16|u?int[0-9]+|float[0-9]+)
        aoti_torch_dtype_(complex[0-9]+|float8_e[45]m[23]fn(uz)?|float8_e5m2(fnuz)?)
        aoti_torch_layout_[a-z_]+ aoti_torch_memory_format_[a-z_]+
        aoti_torch_get_(device_index|device_type|dim|dtype|numel|size|sizes|stride|strides)
        aoti_torch_dtype_element_size
        aoti_torch_is_contiguous aoti_torch_library_(def|init_fragment|init_impl)
        aoti_torch_new_(tensor_handle|uninitialized_tensor)
        aoti_torch_(create|delete)_device_guard
    """,
    (2, 10): """
        torch_call_dispatcher torch_delete_list torch_get_(const|mutable)_data_ptr
        torch_get_num_threads torch_library_impl torch_list_(get_item|push_back|set_item|size)
        torch_new_list_reserve_size torch_parallel_for
    """,
    (2, 11): "torch_dtype_(float4_e2m1fn_x2|float8_e8m0fnu)",
}

SYSTEM_LIBRARIES = re.compile(r"lib(torch_cpu|stdc\+\+|gcc_s|m|c|dl|rt|pthread)\.so|ld-linux")


def nm(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type, name) of the symbols of a file."""
    output = subprocess.check_output(["nm", *options, path], text=True)
    rows = (line.split() for line in output.splitlines())
    return [(row[-2], row[-1].split("@")[0]) for row in rows if len(row) >= 2]


def test_the_module_is_there() -> None:
    assert any(path.name.startswith("_C.") for path in LIBRARIES)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_torch_symbols_are_those_of_the_stable_interface(library: Path) -> None:
    undefined = {name for kind, name in nm(library, "-D", "--undefined-only") if kind == "U"}
    assert any(name.startswith("aoti_torch_") for name in undefined)
    cxx = [name for name in undefined if re.match(r"_ZN?K?(2at|3c10|5torch|5caffe)", name)]
    assert cxx == []
    allowed = "|".join("|".join(ALLOWED[version].split()) for version in ALLOWED)
    used = {name for name in undefined if re.match("(aoti_)?torch_", name)}
    assert [name for name in used if not re.fullmatch(allowed, name)] == []
    assert max(ALLOWED) <= FLOOR


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_needed_libraries(library: Path) -> None:
    dynamic = subprocess.check_output(["readelf", "-d", library], text=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if not SYSTEM_LIBRARIES.match(name)] == []
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_only_entry_points_are_exported(library: Path) -> None:
    exported = [name for _, name in nm(library, "-D", "--defined-only")]
    assert [name for name in exported if "alignops" in name] == []


def isa_objects() -> list[Path]:
    builds = sorted((ROOT / "build").glob(f"{sys.implementation.cache_tag}-*/"))
    return [path for build in builds for path in build.rglob("avx*.o")]


def test_isa_objects_define_no_weak_symbol() -> None:
    """The linker may use a weak copy everywhere, also on a CPU that lacks its instructions."""
    objects = isa_objects()
    assert objects, "no build folder: install with `pip install --no-build-isolation -e .`"
    weak = [(path.name, name) for path in objects for kind, name in nm(path) if kind in "wWvVu"]
    assert weak == []
