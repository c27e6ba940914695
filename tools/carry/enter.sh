#!/bin/sh
# Runs a command in the root that this file is in, with the machine's devices and driver: ROOT/enter.sh COMMAND, as root.
here=$(dirname "$(readlink -f "$0")")
# The mounts are this command's alone: who removes the root later does not remove the devices.
[ "${MOUNTED-}" ] || MOUNTED=1 exec unshare --mount "$here/enter.sh" "$@"
for folder in proc sys dev; do
    mkdir -p "$here/$folder" && mount --rbind "/$folder" "$here/$folder" || exit
done
mkdir -p "$here/tmp"
folders=$(echo "${LD_LIBRARY_PATH-}" /usr/local/nvidia/lib64 | tr : ' ')
for file in $(ldconfig -p | sed 's/.*=> //') $(find -L $folders -name 'lib*.so*' 2>/dev/null); do
    case $file in */libcuda.so* | */libnvidia-*.so*) cp -Lu "$file" "$here/usr/lib/" ;; esac
done
. "$here/paths" # repository, bin
exec env -i HOME=/root PYTHONPATH=.:kernels:grading PATH="$bin:/usr/bin:/bin:/usr/sbin:/sbin" LD_LIBRARY_PATH=/usr/lib \
    chroot "$here" sh -c 'cd "$0" && exec "$@"' "$repository" "$@"
