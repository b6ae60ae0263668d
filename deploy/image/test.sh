#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Build the image without a container engine and ask a server inside it for a verdict. Needs root, buildah, debootstrap.
#
#   BUILDAH_ARGS   more arguments for `buildah bud`, e.g. --build-arg TORCH_INDEX_URL=... or --volume /etc/pip.conf:/etc/pip.conf:ro
#   SUITE, MIRROR  what debootstrap makes the base of
#   TARGET         cpu or cuda
#   PORT           where the server listens: the network is the host's
set -eu
cd "$(dirname "$0")/../.."
: "${SUITE:=bookworm}" "${MIRROR:=http://deb.debian.org/debian}" "${TARGET:=cpu}" "${PORT:=18000}" "${BUILDAH_ARGS:=}"
export STORAGE_DRIVER="${STORAGE_DRIVER:-vfs}" BUILDAH_ISOLATION=chroot
base=localhost/oodgate-base:$SUITE
image=localhost/oodgate:$TARGET
work=$(mktemp -d)
container=
server=

clean() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    [ -z "$container" ] || buildah rm "$container" >/dev/null || true
    rm -rf "$work"
}
trap clean EXIT

if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
    echo "== base: Debian $SUITE with Python"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$SUITE" "$work/root" "$MIRROR"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$work/root" / >/dev/null
    buildah commit --quiet "$container" "$base"
    buildah rm "$container" >/dev/null
    container=
    rm -rf "$work/root"
fi

echo "== image: $TARGET"
# The health check is part of Docker's format alone.
# shellcheck disable=SC2086  # several arguments
buildah bud --format docker --build-arg BASE="$base" --target "$TARGET" $BUILDAH_ARGS --tag "$image" .

echo "== settings of the image"
python3 - "$image" <<'PY'
import json, subprocess, sys
image = json.loads(subprocess.check_output(["buildah", "inspect", "--type", "image", sys.argv[1]]))["Docker"]["config"]
assert image["User"] == "10001:10001", image["User"]
assert image["Entrypoint"] == ["oodgate"] and image["Cmd"] == ["serve"], image
assert "/var/lib/oodgate" in image["Volumes"], image
assert image["Healthcheck"]["Test"][0] == "CMD", image
print(*image["Env"], sep="\n")
PY

echo "== a server in it"
container=$(buildah from "$image")
root=$(buildah mount "$container")
touch "$work/started"
buildah run --env OODGATE_PORT="$PORT" "$container" -- oodgate serve >"$work/log" 2>&1 &
server=$!
python3 - "$PORT" "$server" "$work/log" <<'PY'
import json, os, sys, time, urllib.error, urllib.request
port, server, log = sys.argv[1], int(sys.argv[2]), sys.argv[3]
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
def ask(path, body=None):
    headers = {"Content-Type": "image/png"} if body else {}
    return opener.open(urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers), timeout=60)
for _ in range(240):
    try:
        os.kill(server, 0)
        if ask("/v2/health/ready").status == 200:
            break
    except ProcessLookupError:
        sys.exit("the server ended:\n" + open(log).read())
    except (urllib.error.URLError, ConnectionError):
        pass
    time.sleep(0.5)
else:
    sys.exit("not ready within two minutes:\n" + open(log).read())
for name, expected in (("cat", "accept"), ("static", "defer")):
    verdict = json.load(ask("/v1/verdict", open(f"examples/{name}.png", "rb").read()))
    print(name, verdict["decision"], verdict["prediction"]["label"], verdict["ood"]["p_value"])
    assert verdict["decision"] == expected, verdict
PY

echo "== the image's own health check"
buildah run --env OODGATE_PORT="$PORT" "$container" -- python3 -c "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['OODGATE_PORT'] + '/v2/health/ready', timeout=4)"

echo "== written outside the volume and /tmp: nothing"
written=$(find "$root" -xdev -newer "$work/started" -type f \
    -not -path "$root/var/lib/oodgate/*" -not -path "$root/tmp/*" -not -path "$root/proc/*" -not -path "$root/sys/*" \
    -not -path "$root/dev/*" -not -path "$root/run/*" -not -path "$root/etc/hosts" -not -path "$root/etc/resolv.conf")
[ -z "$written" ] || { echo "$written"; exit 1; }
echo "== done"
