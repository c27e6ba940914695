#!/bin/bash
# Makes a folder that is a CUDA toolkit to nvcc and its users, of links to an environment's packages: cuda_home.sh PYTHON FOLDER
#
# Packages have their libraries in lib, by the names that programs load. Linkers look in lib64 for names without a version,
# and in lib64/stubs for the driver: the machine that links need not have one.
set -eu
site=$("$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') folder=$(realpath --canonicalize-missing "$2")
rm -rf "$folder"
mkdir -p "$folder"/bin "$folder"/lib64/stubs
cd "$folder"
packages=$(realpath --relative-to . "$site/nvidia/cu13")
ln -s "$packages"/{include,nvvm} .
ln -s lib64 lib
# nvcc looks for the rest beside the folder in which it was started.
(cd bin && ln -s ../"$packages"/bin/* .)
(cd lib64 && ln -s ../"$packages"/lib/* .)
for library in lib64/*.so.*; do
    name=${library##*/}
    ln -sf "$name" "${library%%.so.*}.so"
done
# A stub has the driver's names only.
grep -oE '\bcu[A-Z]\w+' include/cuda.h | sort -u | sed 's/.*/void &(void) {}/' |
    g++ -shared -fPIC -Wl,-soname,libcuda.so.1 -x c - -o lib64/stubs/libcuda.so
