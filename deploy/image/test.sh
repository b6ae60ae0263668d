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
python3 - "$image" "$work/check" <<'PY'
import json, subprocess, sys
image = json.loads(subprocess.check_output(["buildah", "inspect", "--type", "image", sys.argv[1]]))["Docker"]["config"]
assert image["User"] == "10001:10001", image["User"]
assert image["Entrypoint"] == ["oodgate"] and image["Cmd"] == ["serve"], image
assert "/var/lib/oodgate" in image["Volumes"], image
kind, *check = image["Healthcheck"]["Test"]
assert kind == "CMD", image
json.dump(check, open(sys.argv[2], "w"))
print(*image["Env"], sep="\n")
PY

container=$(buildah from "$image")
user=$(buildah run "$container" -- id -u)
[ "$user" = 10001 ] || { echo "it runs as $user"; exit 1; }

# As docker-compose.yml starts it: root file system read-only, /tmp in memory, no capabilities and no way to any.
# What makes it so needs rights that the service then has not; that root itself cannot write any more proves it.
echo "== a server in it, as user $user on a read-only root"
buildah run --user 0 --cap-add CAP_SYS_ADMIN --env OODGATE_PORT="$PORT" "$container" -- sh -euc '
    mount -o remount,bind,ro / && mount -t tmpfs tmpfs /tmp
    if touch /opt/oodgate/written; then echo "the root file system can be written"; exit 1; fi
    exec setpriv --reuid 10001 --regid 10001 --clear-groups --bounding-set=-all --no-new-privs oodgate serve
' >"$work/log" 2>&1 &
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

echo "== the image's own health check: well on this port, unwell on another"
check() {
    python3 - "$1" "$container" "$work/check" <<'PY'
import json, subprocess, sys
port, container, check = sys.argv[1:]
command = ["buildah", "run", "--env", f"OODGATE_PORT={port}", container, "--", *json.load(open(check))]
sys.exit(subprocess.run(command, stderr=subprocess.DEVNULL).returncode != 0)
PY
}
check "$PORT"
if check 1; then echo "it is well where no server listens"; exit 1; fi
echo "== done"
