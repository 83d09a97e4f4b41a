#!/usr/bin/env bash
# A ROS 2 environment from wheels, with ratchet_msgs built into it; everything else is seen in the main environment.
#   build.sh VENV PYTHON MAIN_VENV LOCK...
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
venv=$1 python=$2 main=$3
shift 3
test -x "$venv/bin/python" || "$python" -m venv "$venv"
venv=$(cd "$venv" && pwd)
requirements=()
for lock in "$@"; do requirements+=(-r "$lock"); done
"$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-deps "${requirements[@]}"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
theirs=$("$main/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$theirs" "$root/agent" "$root/sim" "$root/calibration" "$root/ros2_ws/src/ratchet_ros" > "$site/ratchet.pth"
# No optimisation: messages are moved, not computed, and the compiler is what takes the time.
export PATH="$venv/bin:$PATH" AMENT_PREFIX_PATH="$venv"
for package in "$root"/ros2_ws/src/ratchet_msgs "$root"/tests/ros2_ws/stand_ins/control_msgs; do
  build="$root/build/$(basename "$venv")/$(basename "$package")"
  rm -rf "$build"
  mkdir -p "$build"
  {
    cmake -S "$package" -B "$build" -DCMAKE_INSTALL_PREFIX="$venv" -DBUILD_TESTING=OFF \
      -DCMAKE_C_FLAGS=-O0 -DCMAKE_CXX_FLAGS=-O0 -DCMAKE_PROJECT_INCLUDE="$root/ros2_ws/pip/pip_ros.cmake" &&
      cmake --build "$build" --parallel "$(nproc)" && cmake --install "$build"
  } > "$build/log.txt" 2>&1 || { tail -30 "$build/log.txt" >&2; exit 1; }
done
