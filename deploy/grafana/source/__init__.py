# SPDX-License-Identifier: Apache-2.0
"""Where the dashboards come from: `python -m deploy.grafana.source` writes the JSON that Grafana reads."""
