#!/usr/bin/env bash
# Builds the image as a user would, runs it locked down, and asks it for what it promises.
#
#   sudo deploy/container/check.sh                 on Debian, from a base made by debootstrap
#   sudo BASE=IMAGE deploy/container/check.sh      from a base image that buildah can get
#
# Needs buildah, crun, util-linux, python3 and, without BASE, debootstrap. TORCH_INDEX is passed
# on to the build; empty (the default here) means that the configured index has a CPU build.
# Everything is made in a directory of its own and removed at the end (KEEP=1 keeps it).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)

for tool in buildah crun unshare nsenter python3 ${BASE:+true} ${BASE-debootstrap}; do
  command -v "$tool" >/dev/null || { echo "check.sh: $tool is missing" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "check.sh: must run as root" >&2; exit 2; }

work=$(mktemp --directory --tmpdir momaserve-image.XXXXXX)
# vfs and chroot need no kernel feature beyond root: they work inside other containers too.
store=(--root "$work/store" --runroot "$work/runroot" --storage-driver vfs)
say() { printf '%-34s %s\n' "$1" "$2"; }
seconds_since() { echo "$(($(date +%s) - $1)) s"; }

cleanup() {
  crun delete --force momaserve-check >/dev/null 2>&1 || true
  [ -n "${KEEP:-}" ] && { echo "kept: $work"; return; }
  buildah "${store[@]}" umount --all >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap cleanup EXIT

base=${BASE:-}
if [ -z "$base" ]; then
  started=$(date +%s)
  base=localhost/momaserve-base
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
    bookworm "$work/base" >"$work/debootstrap.log" 2>&1 || { tail "$work/debootstrap.log"; exit 1; }
  rm -rf "$work"/base/var/lib/apt/lists/* "$work"/base/var/cache/apt/archives/*.deb
  container=$(buildah "${store[@]}" from scratch)
  buildah "${store[@]}" add --quiet "$container" "$work/base" / >/dev/null
  buildah "${store[@]}" commit --quiet --rm "$container" "$base" >/dev/null
  rm -rf "$work/base"
  say "base image made in" "$(seconds_since "$started")"
fi

# The builder's own pip settings reach the build as a secret, and the local directories that they
# name as read-only mounts: neither becomes part of the image.
mapfile -t volumes < <(python3 "$here/pip_settings.py" "$work/pip.conf")
started=$(date +%s)
buildah "${store[@]}" bud --isolation chroot --format docker \
  --build-arg BASE="$base" --build-arg TORCH_INDEX="${TORCH_INDEX:-}" \
  --build-arg VERSION=check --secret "id=pip_conf,src=$work/pip.conf" "${volumes[@]}" \
  --tag localhost/momaserve:check "$root" >"$work/build.log" 2>&1 ||
  { tail -40 "$work/build.log"; exit 1; }
say "image built in" "$(seconds_since "$started")"

container=$(buildah "${store[@]}" from localhost/momaserve:check)
mounted=$(buildah "${store[@]}" mount "$container")
buildah "${store[@]}" inspect --type image localhost/momaserve:check >"$work/image.json"
say "image size" "$(du --summarize --block-size=1M "$mounted" | cut -f1) MiB"
python3 "$here/inspect_image.py" "$work/image.json" "$mounted"

# run NAME [OPTION of bundle.py ...]: as PID 1 of its own namespaces, root file system read-only,
# no capability, no network but its own loopback; sets $pid and $runner.
run() {
  local bundle="$work/bundle-$1"
  mkdir "$bundle"
  python3 "$here/bundle.py" "$work/image.json" "$mounted" "$bundle" "${@:2}"
  # crun refuses cgroup v1 hosts; it needs no cgroup here, so it is shown an empty v2 tree.
  # shellcheck disable=SC2016  # $0 belongs to the inner shell
  unshare --mount sh -c 'mount -t cgroup2 none /sys/fs/cgroup &&
    exec crun --cgroup-manager=disabled run --bundle "$0" --pid-file "$0/pid" momaserve-check' \
    "$bundle" >"$bundle/log" 2>&1 &
  runner=$!
  until [ -s "$bundle/pid" ]; do
    kill -0 "$runner" 2>/dev/null || { cat "$bundle/log"; exit 1; }
    sleep 0.1
  done
  pid=$(cat "$bundle/pid")
}

# ask PYTHON-ARGUMENTS: from inside the container's network, as the host's root.
ask() {
  nsenter --target "$pid" --net \
    python3 "$here/check_server.py" --image "$work/image.json" --pid "$pid" "$@"
}

ended() {
  local code=0
  wait "$runner" || code=$?
  [ "$code" = 0 ] || { echo "exit code $code" >&2; cat "$work/bundle-$1/log"; exit 1; }
  say "$1: exit code after SIGTERM" 0
}

failed() { cat "$work/bundle-$1/log"; exit 1; }

echo "--- locked: uid 10001, /tmp in memory, one stream running at SIGTERM"
run locked --tmp
ask --uid 10001 --drain || failed locked
ended locked

echo "--- bare: a uid that the image does not know, nothing writable at all"
run bare --uid 12345
ask --uid 12345 || failed bare
ended bare
echo "the image does what it promises"
