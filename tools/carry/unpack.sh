#!/bin/sh
# Checks the pieces beside this file and unpacks them: sh unpack.sh ROOT, a new folder, as root.
set -eu
cd "$(dirname "$0")"
sha256sum --quiet --check SHA256SUMS || { echo "a piece is missing or not what was packed: carry it again" >&2; exit 1; }
mkdir "$1"
cat piece.* | xz -dcT0 | tar -xC "$1"
cp enter.sh paths "$1"
"$1/enter.sh" python -m tools.carry.arrived
