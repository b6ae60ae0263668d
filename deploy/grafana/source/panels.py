# SPDX-License-Identifier: Apache-2.0
"""What the dashboards share: variables, selectors of series, panels of one look."""

from __future__ import annotations

from collections.abc import Mapping

from grafana_foundation_sdk.builders import (
    common as common_builders,
    dashboard as dashboards,
    heatmap,
    prometheus,
    stat,
    timeseries,
)
from grafana_foundation_sdk.models import common, dashboard as models, heatmap as heatmap_models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
PROVISIONED = "oodgate-prometheus"
OF_INSTANCE = 'instance=~"$instance"'
OF_MODEL = f'model=~"$model",version=~"$version",{OF_INSTANCE}'
FULL, HALF, THIRD, QUARTER = 24, 12, 8, 6

Queries = Mapping[str, str]  # legend: expression


def board(slug: str, title: str, description: str) -> dashboards.Dashboard:
    """An empty dashboard with the variables of all."""
    return (
        dashboards.Dashboard(f"oodgate {title}")
        .uid(f"oodgate-{slug}")
        .description(description)
        .tags(["oodgate"])
        .readonly()
        .refresh("10s")
        .time("now-30m", "now")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboards.DashboardLink("oodgate")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["oodgate"])
            .keep_time(True)
            .include_vars(True)
        )
        .with_variable(
            dashboards.DatasourceVariable("datasource")
            .label("Data source")
            .type("prometheus")
            .current(models.VariableOption(text="Prometheus", value=PROVISIONED))
        )
        .with_variable(_variable("model", "label_values(oodgate_model_ready, model)"))
        .with_variable(_variable("version", 'label_values(oodgate_model_ready{model=~"$model"}, version)'))
        .with_variable(_variable("instance", "label_values(oodgate_build_info, instance)"))
    )


def _variable(name: str, query: str) -> dashboards.QueryVariable:
    return (
        dashboards.QueryVariable(name)
        .label(name.capitalize())
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(text=["All"], value=["$__all"]))
    )


def _targets(queries: Queries, shape: PromQueryFormat, *, instant: bool = False) -> list[prometheus.Dataquery]:
    targets = []
    for letter, (legend, expr) in zip("ABCDEFGHIJKLMNOP", queries.items(), strict=False):
        query = prometheus.Dataquery().datasource(SOURCE).ref_id(letter).expr(expr).legend_format(legend).format(shape)
        targets.append(query.instant() if instant else query.range())
    return targets


def lines(
    title: str, description: str, queries: Queries, unit: str, width: int = HALF, *, exemplars: bool = False
) -> timeseries.Panel:
    """Series over time; with `exemplars`, traces are points among them."""
    targets = _targets(queries, PromQueryFormat.TIME_SERIES)
    return (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets([target.exemplar(True) for target in targets] if exemplars else list(targets))
        .unit(unit)
        .min(0)
        .span(width)
        .height(8)
        .line_width(1)
        .fill_opacity(8)
        .show_points(common.VisibilityMode.NEVER)
        .legend(
            common_builders.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(
            common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
        )
    )


def stacked(title: str, description: str, queries: Queries, unit: str, width: int = HALF) -> timeseries.Panel:
    """Parts of a whole over time."""
    return (
        lines(title, description, queries, unit, width)
        .fill_opacity(40)
        .stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    )


def limits(panel: timeseries.Panel, legend: str) -> timeseries.Panel:
    """Draw the series whose legends match as dashed limits."""
    dashes = {"fill": "dash", "dash": [8, 6]}
    return panel.override_by_regexp(
        legend,
        [
            models.DynamicConfigValue(id_val="custom.lineStyle", value=dashes),
            models.DynamicConfigValue(id_val="custom.fillOpacity", value=0),
            models.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": "semi-dark-orange"}),
        ],
    )


def number(
    title: str, description: str, queries: Queries, unit: str, steps: Mapping[float | None, str], width: int = QUARTER
) -> stat.Panel:
    """Numbers now; `steps` maps where a colour begins (None: at the bottom) to the colour."""
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(list(_targets(queries, PromQueryFormat.TIME_SERIES, instant=True)))
        .unit(unit)
        .span(width)
        .height(5)
        .thresholds(_thresholds(steps))
    )


def heat(title: str, description: str, expr: str, width: int = FULL) -> heatmap.Panel:
    """A histogram over time; `expr` gives its cumulative buckets by `le`."""
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(list(_targets({"{{le}}": expr}, PromQueryFormat.HEATMAP)))
        .unit("short")
        .span(width)
        .height(9)
        .calculate(False)
        .color(heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64))
        .y_axis(heatmap.YAxisConfig().unit("short"))
        .show_legend()
    )


def _thresholds(steps: Mapping[float | None, str]) -> dashboards.ThresholdsConfig:
    return (
        dashboards.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(value=value, color=color) for value, color in steps.items()])
    )
