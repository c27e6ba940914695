"""What a process says of the CUDA libraries that it has loaded."""

import subprocess
import sys

LIBRARIES = {
    "libcudnn.so.9": "unsigned long cudnnGetVersion(void) { return 92001; }",
    "libnvrtc.so.13.0.88": "int nvrtcVersion(int *a, int *b) { *a = 13; *b = 0; return 0; }",
    "libnccl.so.2": "int ncclGetVersion(int *version) { *version = 22907; return 0; }",
    "libcuda.so.580.95.05": "int cuDriverGetVersion(int *version) { *version = 13010; return 0; }",
    # Of the same library, and another one.
    "libcudnn_ops.so.9": "unsigned long cudnnGetVersion(void) { return 1; }",
    "libnvrtc-builtins.so.13.0": "int other;",
}
SCRIPT = """
import ctypes, sys
from megatron_r1.models.loaded_libraries import loaded_libraries
assert loaded_libraries() == []
for file in sys.argv[1:]:
    ctypes.CDLL(file)
print(*loaded_libraries(), sep="\\n")
"""


def _compile(file, source):
    command = ["cc", "-shared", "-xc", "-", "-o", str(file)]
    subprocess.run(command, input=source, text=True, check=True)
    return str(file)


def test_each_loaded_file_is_named_with_the_version_that_its_code_reports(tmp_path):
    files = [_compile(tmp_path / name, source) for name, source in LIBRARIES.items()]
    (tmp_path / "other").mkdir()
    other = LIBRARIES["libnvrtc.so.13.0.88"].replace("= 0", "= 5")
    files.append(_compile(tmp_path / "other/libnvrtc.so.13", other))
    other = LIBRARIES["libcudnn.so.9"].replace("92001", "91900")
    files.append(_compile(tmp_path / "other/libcudnn_graph.so.9", other))
    command = [sys.executable, "-c", SCRIPT, *files]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == [
        f"cuDNN 9.20.1 ({tmp_path}/libcudnn.so.9)",
        f"cuDNN 9.19.0 ({tmp_path}/other/libcudnn_graph.so.9)",
        f"NVRTC 13.0 ({tmp_path}/libnvrtc.so.13.0.88)",
        f"NVRTC 13.5 ({tmp_path}/other/libnvrtc.so.13)",
        f"NCCL 2.29.7 ({tmp_path}/libnccl.so.2)",
        f"CUDA of the driver 13.1.0 ({tmp_path}/libcuda.so.580.95.05)",
    ]
