#!/bin/bash
# Builds transformer-engine-torch from its sdist against an environment's torch: transformer_engine.sh PYTHON VERSION FOLDER
#
# It is C++ only, and the headers of CUDA are in packages that torch depends on, so neither nvcc nor a CUDA toolkit is
# needed. Each of its 33 files spends its time in torch's headers: they are compiled as a few. OPTIMIZE replaces
# upstream's -O3; JOBS: files, each compiled at once with the others in up to 3 GB. An interrupted build goes on.
set -eu
python=$(realpath --no-symlinks "$1") version=$2 folder=$(realpath "$3")
cores=$(nproc)
jobs=${JOBS:-$((cores < 8 ? cores : 8))}
source=$folder/transformer_engine_torch-$version
export NVTE_PYTORCH_FORCE_BUILD=TRUE      # without it, its setup.py looks for a wheel outside the package index
export NVTE_BUILD_USE_NVIDIA_WHEELS=1     # headers of site-packages/nvidia
export NVTE_NO_LOCAL_VERSION=1            # in a git checkout it would add the commit, and then refuse its own version
export MAX_JOBS=$jobs PATH=$(dirname "$python"):$PATH  # ninja is in the environment
quietly=(--quiet --disable-pip-version-check --no-deps --no-build-isolation)

if [ ! -e "$source/.merged" ]; then
    "$python" -m pip download "${quietly[@]}" --no-binary :all: --dest "$folder" "transformer-engine-torch==$version"
    rm -rf "$source"
    tar -xzf "$source.tar.gz" -C "$folder"
    cd "$source/csrc"
    number=0
    for file in $(find . -name '*.cpp' | sort); do
        mv "$file" "${file%.cpp}.inc"
        echo "#include \"${file%.cpp}.inc\"" >>"merged_$((number++ % jobs)).cpp"
    done
    sed -i "s/\"-O3\"/\"${OPTIMIZE:--O3}\"/" "$source/build_tools/pytorch.py"
    touch "$source/.merged"
fi
"$python" -m pip install "${quietly[@]}" "$source"
