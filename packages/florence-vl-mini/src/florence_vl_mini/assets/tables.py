"""Small tables of real numbers for charts: selected and rounded from vega-datasets and statsmodels."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

Row = dict[str, Any]
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
WIDTHS = {"title": 18, "label": 10, "value": 4}  # characters
ROWS = (3, 8)
COUNTRIES = "Japan China India Brazil Mexico Turkey Egypt Spain Iran Kenya Ireland Chile"

# statsmodels' wheels differ by platform, its tables do not.
STATSMODELS = {
    "elnino": "b647be00e0fd264be9764e317e6b963f35030014ecca2b21b204521716e463ad",
    "longley": "0927ec7cc34edb5670920cb2ff1542e46de27a2010746e1662f4276cf3569a24",
    "macrodata": "d93c0d3a7a77ef83c3af14e46032bb1d02ae3a512b22ab94159a8ca226fcf708",
    "nile": "88e97bea7249e5832a85e41aec6ce4b8f7b1b14aae930c8363da7f193286b598",
    "statecrime": "73c8aaa12272cbd33a09d0ffcda01a835f2f0916a16aaed54732efa312430688",
    "sunspots": "f67889b1d9002cd5227f0e0ef54e35b419cdd85a31279adef6f73fb41e5c0a9b",
}
# vega-datasets' datapackage.json says so of each; tables with other or no terms are not used.
VEGA = {
    "airports.csv": "U.S. Government work (public domain)",
    "birdstrikes.csv": "U.S. Government work (public domain)",
    "co2-concentration.csv": "CC-BY-4.0 (Scripps CO2 Program)",
    "flights-airport.csv": "U.S. Government work (public domain)",
    "gapminder-health-income.csv": "CC-BY-4.0 (Gapminder)",
    "gapminder.json": "CC-BY-4.0 (Gapminder)",
    "global-temp.csv": "U.S. Government work (public domain)",
    "iowa-electricity.csv": "U.S. Government work (public domain)",
    "monarchs.json": "OGL-3.0 (royal.uk)",
    "penguins.json": "CC0-1.0",
    "population_engineers_hurricanes.csv": "U.S. Government work (public domain)",
    "unemployment-across-industries.json": "U.S. Government work (public domain)",
    "us-employment.csv": "U.S. Government work (public domain)",
    "weather.csv": "U.S. Government work (public domain)",
    "wheat.json": "public domain (W. Playfair, 1822)",
}


def cells(values: Iterable[float], decimals: int = 1) -> list[str]:
    """Numbers as written in a picture: equal decimals, at most `decimals`, and at most 4 characters each."""
    values = list(values)
    for places in range(decimals, -1, -1):
        texts = [f"{v:.{places}f}" for v in values]
        if max(map(len, texts)) <= WIDTHS["value"]:
            return texts
    raise ValueError(f"numbers of more than {WIDTHS['value']} characters: {values}: choose a larger unit")


def percents(values: Sequence[float]) -> list[int]:
    """Whole percentages of the sum that add up to 100 (the largest remainders are rounded up)."""
    total = sum(values)
    exact = [100 * v / total for v in values]
    out = [int(e) for e in exact]
    for i in sorted(range(len(out)), key=lambda i: (out[i] - exact[i], i))[: 100 - sum(out)]:
        out[i] += 1
    return out


class _Tables:
    """Collects tables; `kind` is series (over time), groups, parts (percent of a whole) or pairs (two measures)."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(
        self,
        kind: str,
        source: str,
        title: str,
        label: str,
        labels: Iterable[Any],
        columns: Mapping[str, tuple[str, Iterable[float]]],
        decimals: int = 1,
    ) -> None:
        """`columns`: name -> (unit, numbers)."""
        names = [str(x) for x in labels]
        made = [{"name": n, "unit": u, "values": cells(v, decimals)} for n, (u, v) in columns.items()]
        assert len(title) <= WIDTHS["title"], title
        assert ROWS[0] <= len(names) <= ROWS[1], (title, names)
        assert len(set(names)) == len(names), (title, names)
        assert all(len(x) <= WIDTHS["label"] for x in names), (title, names)
        assert all(len(c["values"]) == len(names) for c in made), title
        package = "vega-datasets" if source in VEGA else "statsmodels"
        licence = VEGA.get(source, "public domain")
        self.rows.append(
            {
                "id": f"{source.split('.')[0]}/{'-'.join(re.findall('[a-z0-9]+', title.lower()))}",
                "kind": kind,
                "title": title,
                "label": label,
                "labels": names,
                "columns": made,
                "source": f"{package}: {source}",
                "licence": licence,
            }
        )


def _split(rows: list[Row]) -> None:
    """Per table and kind, about 20 % test and 10 % val, by the hash of the ids."""
    for kind in ("series", "groups", "parts", "pairs"):
        group = sorted(
            (r for r in rows if r["kind"] == kind), key=lambda r: hashlib.sha256(r["id"].encode()).hexdigest()
        )
        test, val = max(2, round(0.2 * len(group))), max(1, round(0.1 * len(group)))
        for i, row in enumerate(group):
            row["split"] = "test" if i < test else "val" if i < test + val else "train"


def vega_licences(vega: Path) -> str:
    """License and origin of each table in use, as stated in vega-datasets' datapackage.json.

    Raises:
        ValueError: The license of a table is missing.
    """
    described = {r["path"]: r for r in json.loads((vega / "datapackage.json").read_text(encoding="utf-8"))["resources"]}
    lines = []
    for name, licence in VEGA.items():
        stated = described.get(name, {}).get("licenses")
        if not stated:
            raise ValueError(f"vega-datasets states no license for {name}: it cannot be used")
        terms = "; ".join(" ".join(x.get(k, "") for k in ("name", "title", "path") if k in x) for x in stated)
        origin = "; ".join(x.get("title", "") for x in described[name].get("sources", []))
        lines.append(f"{name}: {licence}\n  stated: {terms}\n  sources: {origin}\n")
    return "".join(lines)


def make_tables(vega: Path, statsmodels: Path) -> list[Row]:
    """All tables.

    Args:
        vega: The unpacked npm package vega-datasets (the folder with datapackage.json).
        statsmodels: The unpacked Python package (the folder with `datasets/`).

    Returns:
        Rows of id, kind, title, label (what the labels are), labels, columns (name, unit, values as written), source,
        licence, split; ordered by id.

    Raises:
        ValueError: A table of statsmodels is not the expected one, or vega-datasets states other terms.
    """

    def read(name: str) -> list[Row]:
        path = vega / "data" / name
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def read_stats(name: str) -> list[Row]:
        path = statsmodels / "datasets" / name / f"{name}.csv"
        have = hashlib.sha256(path.read_bytes()).hexdigest()
        if have != STATSMODELS[name]:
            raise ValueError(
                f"{path} has SHA-256 {have[:12]}…, expected {STATSMODELS[name][:12]}…: take another statsmodels"
            )
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    vega_licences(vega)
    out = _Tables()
    for part in (_gapminder, _weather, _work, _aviation, _nature, _past):
        part(out, read)
    for part in (_economy, _sky_and_sea, _states):
        part(out, read_stats)
    ids = [r["id"] for r in out.rows]
    assert len(set(ids)) == len(ids), [i for i in ids if ids.count(i) > 1]
    _split(out.rows)
    return sorted(out.rows, key=lambda r: r["id"])


Reader = Callable[[str], list[Row]]


def _gapminder(out: _Tables, read: Reader) -> None:
    at = {(r["country"], int(r["year"])): r for r in read("gapminder.json")}
    regions = {
        "Europe": "Italy France Spain Norway Germany Greece Poland Ireland",
        "S. Europe": "Portugal Greece Turkey Croatia Italy Spain",
        "N. Europe": "Iceland Norway Finland Belgium Ireland Poland",
        "Americas": "Canada Mexico Brazil Peru Chile Cuba Haiti Bolivia",
        "S. America": "Argentina Colombia Ecuador Venezuela Jamaica Peru",
        "Asia": "Japan China India Indonesia Pakistan Bangladesh",
        "Near East": "Israel Egypt Iran Iraq Lebanon Turkey",
        "Africa": "Kenya Nigeria Rwanda Egypt",
    }
    for region, names in regions.items():
        countries = names.split()

        def column(key: str, year: int, of: list[str] = countries, scale: float = 1.0) -> list[float]:
            return [at[c, year][key] / scale for c in of]

        years: Sequence[int] = (1955, 1980, 2005)
        out.add(
            "groups", "gapminder.json", f"Life: {region}", "Country", countries,
            {str(y): ("years", column("life_expect", y)) for y in years}, 0,
        )  # fmt: skip
        out.add(
            "groups", "gapminder.json", f"Births: {region}", "Country", countries,
            {str(y): ("per woman", column("fertility", y)) for y in years},
        )  # fmt: skip
        out.add(
            "groups", "gapminder.json", f"People: {region}", "Country", countries,
            {str(y): ("millions", column("pop", y, scale=1e6)) for y in (1965, 2000)},
        )  # fmt: skip
        if len(countries) > 5:
            out.add(
                "pairs", "gapminder.json", f"Family: {region}", "Country", countries,
                {"Life": ("years", column("life_expect", 1980)), "Births": ("per woman", column("fertility", 1980))},
            )  # fmt: skip
    for country in COUNTRIES.split():
        years = list(range(1955, 2006, 10))
        out.add(
            "series", "gapminder.json", f"Life in {country}", "Year", years,
            {
                "Life": ("years", [at[country, y]["life_expect"] for y in years]),
                "Births": ("per woman", [at[country, y]["fertility"] for y in years]),
            },
        )  # fmt: skip
    rows = {r["country"]: r for r in read("gapminder-health-income.csv")}
    for title, names in {
        "Income in Europe": "Austria Cyprus Denmark France Hungary Latvia Portugal Serbia",
        "Income in Africa": "Angola Botswana Ghana Kenya Mali Namibia Togo Zambia",
        "Income in America": "Belize Canada Guyana Mexico Panama Uruguay Bolivia Haiti",
        "Income in Asia": "Cambodia Fiji Japan Malaysia Mongolia Nepal Thailand Vietnam",
        "Income: the Gulf": "Bahrain Iran Iraq Jordan Kuwait Oman Yemen",
    }.items():
        countries = names.split()
        income = [float(rows[c]["income"]) / 1000 for c in countries]
        health = [float(rows[c]["health"]) for c in countries]
        out.add(
            "pairs", "gapminder-health-income.csv", title, "Country", countries,
            {"Income": ("1000 dollars", income), "Life": ("years", health)},
        )  # fmt: skip


def _weather(out: _Tables, read: Reader) -> None:
    days = read("weather.csv")
    for place in ("Seattle", "New York"):
        high, rain, wind = (defaultdict(list) for _ in range(3))
        kinds: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for row in days:
            if row["location"] != place:
                continue
            key = int(row["date"][:4]), int(row["date"][5:7])
            high[key].append(float(row["temp_max"]))
            rain[key].append(float(row["precipitation"]))
            wind[key].append(float(row["wind"]))
            kinds[key[0]][row["weather"]] += 1
        odd = range(1, 12, 2)
        for year in (2012, 2013, 2014, 2015):
            out.add(
                "series", "weather.csv", f"{place} {year}", "Month", [MONTHS[m - 1] for m in odd],
                {"High": ("Celsius", [fmean(high[year, m]) for m in odd])}
                | {"Wind": ("m/s", [fmean(wind[year, m]) for m in odd])},
            )  # fmt: skip
            names = [k for k in sorted(kinds[year]) if kinds[year][k] >= 18]
            rest = sum(n for k, n in kinds[year].items() if k not in names)
            labels, counts = [n.title() for n in names], [kinds[year][n] for n in names]
            if rest >= 10 or len(labels) < 3:
                labels, counts = [*labels, "Other"], [*counts, rest]
            if ROWS[0] <= len(labels) and min(counts) > 0:
                out.add(
                    "parts", "weather.csv", f"{place} in {year}", "Weather", labels,
                    {"Days": ("percent", percents(counts))}, 0,
                )  # fmt: skip
        even = range(2, 13, 2)
        out.add(
            "series", "weather.csv", f"Rain in {place}", "Month", [MONTHS[m - 1] for m in even],
            {str(y): ("mm", [sum(rain[y, m]) for m in even]) for y in (2013, 2014)}, 0,
        )  # fmt: skip


def _work(out: _Tables, read: Reader) -> None:
    jobs: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in read("us-employment.csv"):
        for key, value in row.items():
            if key != "month":
                jobs[key, int(row["month"][:4])].append(float(value))
    sectors = {
        "Building": "construction", "Factories": "manufacturing", "Shops": "retail_trade",
        "Health": "education_and_health_services", "Leisure": "leisure_and_hospitality",
        "Finance": "financial_activities", "Government": "government", "Mining": "mining_and_logging",
        "Media": "information", "Business": "professional_and_business_services",
    }  # fmt: skip
    years: Sequence[int] = (2006, 2008, 2010, 2012, 2014, 2015)
    for name in ("Building", "Factories", "Shops", "Leisure", "Finance", "Mining"):
        scale = 1000 if name != "Mining" else 1
        unit = "millions" if name != "Mining" else "thousands"
        out.add(
            "series", "us-employment.csv", f"Jobs in {name.lower()}", "Year", years,
            {"Jobs": (unit, [fmean(jobs[sectors[name], y]) / scale for y in years])},
        )  # fmt: skip
    for title, names in {
        "US jobs": ("Building", "Factories", "Shops", "Health", "Leisure", "Finance"),
        "Jobs in services": ("Media", "Finance", "Leisure", "Business", "Health"),
    }.items():
        out.add(
            "groups", "us-employment.csv", title, "Sector", names,
            {str(y): ("millions", [fmean(jobs[sectors[n], y]) / 1000 for n in names]) for y in (2006, 2015)},
        )  # fmt: skip
    for year in (2006, 2010, 2015):
        whole = {"Goods": "goods_producing", "Services": "private_service_providing", "State": "government"}
        out.add(
            "parts", "us-employment.csv", f"US jobs {year}", "Sector", whole,
            {"Share": ("percent", percents([fmean(jobs[k, year]) for k in whole.values()]))}, 0,
        )  # fmt: skip
    for title, names in {
        "Office work": ("Media", "Finance", "Business"),
        "Service work": ("Shops", "Health", "Leisure", "Finance"),
    }.items():
        out.add(
            "parts", "us-employment.csv", title, "Sector", names,
            {"Jobs": ("percent", percents([fmean(jobs[sectors[n], 2014]) for n in names]))}, 0,
        )  # fmt: skip
    rates: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in read("unemployment-across-industries.json"):
        rates[row["series"], row["year"]].append(row["rate"])
    industries = {
        "Farms": "Agriculture", "Building": "Construction", "Finance": "Finance", "State": "Government",
        "Media": "Information", "Factory": "Manufacturing", "Mining": "Mining and Extraction",
        "Leisure": "Leisure and hospitality", "Trade": "Wholesale and Retail Trade",
    }  # fmt: skip
    for label in ("Farms", "Building", "Finance", "Media", "Factory", "Leisure"):
        sampled = (2000, 2002, 2004, 2006, 2008, 2009)
        out.add(
            "series", "unemployment-across-industries.json", f"No job: {label}", "Year", sampled,
            {"Rate": ("percent", [fmean(rates[industries[label], y]) for y in sampled])},
        )  # fmt: skip
    for title, labels in {
        "Unemployment": ("Farms", "Building", "Finance", "State", "Media", "Trade"),
        "Out of work": ("Mining", "Factory", "Leisure", "Media", "Farms"),
    }.items():
        out.add(
            "groups", "unemployment-across-industries.json", title, "Industry", labels,
            {str(y): ("percent", [fmean(rates[industries[n], y]) for n in labels]) for y in (2001, 2006, 2009)},
        )  # fmt: skip
    power = {(r["source"], int(r["year"][:4])): float(r["net_generation"]) for r in read("iowa-electricity.csv")}
    sources = {"Fossil": "Fossil Fuels", "Nuclear": "Nuclear Energy", "Wind etc.": "Renewables"}
    for year in (2005, 2009, 2013, 2017):
        shares = percents([power[s, year] for s in sources.values()])
        out.add(
            "parts", "iowa-electricity.csv", f"Iowa power {year}", "Source", sources, {"Share": ("percent", shares)}, 0
        )
    years = range(2002, 2018, 3)
    out.add(
        "series", "iowa-electricity.csv", "Iowa electricity", "Year", years,
        {n: ("1000 GWh", [power[s, y] / 1000 for y in years]) for n, s in list(sources.items())[::2]},
    )  # fmt: skip


def _aviation(out: _Tables, read: Reader) -> None:
    flights = read("flights-airport.csv")
    total: dict[str, int] = defaultdict(int)
    for row in flights:
        total[row["origin"]] += int(row["count"])
    busiest = sorted(total, key=lambda a: (-total[a], a))
    out.add(
        "groups", "flights-airport.csv", "Busy airports", "Airport", busiest[:8],
        {"Flights": ("thousands", [total[a] / 1000 for a in busiest[:8]])},
    )  # fmt: skip
    for origin in ("ATL", "ORD", "DEN", "LAX", "SEA", "BOS"):
        routes = sorted((-int(r["count"]), r["destination"]) for r in flights if r["origin"] == origin)[:6]
        out.add(
            "groups", "flights-airport.csv", f"Flights from {origin}", "To", [d for _, d in routes],
            {"Flights": ("thousands", [-n / 1000 for n, _ in routes])},
        )  # fmt: skip
    airports: dict[str, int] = defaultdict(int)
    for row in read("airports.csv"):
        airports[row["state"]] += 1
    for title, states in {"Airports": "AK TX CA FL NY GA", "Small airports": "OR CO NJ ME MA HI VT"}.items():
        names = states.split()
        out.add(
            "groups", "airports.csv", title, "State", names, {"Airports": ("number", [airports[s] for s in names])}, 0
        )
    strikes = read("birdstrikes.csv")
    for title, key, labels in (
        ("Bird strikes", "Wildlife Size", {"Small": "Small", "Medium": "Medium", "Large": "Large"}),
        ("Birds by time", "Time of day", {"Day": "Day", "Night": "Night", "Dusk": "Dusk", "Dawn": "Dawn"}),
        ("Birds by phase", "Phase of flight",
         {"Approach": "Approach", "Climb": "Climb", "Take-off": "Take-off run", "Landing": "Landing Roll"}),
        ("Birds hit", "Wildlife Species",
         {"Starling": "European starling", "Pigeon": "Rock pigeon", "Dove": "Mourning dove", "Goose": "Canada goose",
          "Hawk": "Red-tailed hawk", "Kestrel": "American kestrel"}),
    ):  # fmt: skip
        counts = [sum(r[key] == full for r in strikes) for full in labels.values()]
        if title == "Birds by time":
            out.add("parts", "birdstrikes.csv", title, "Time", labels, {"Share": ("percent", percents(counts))}, 0)
        else:
            out.add("groups", "birdstrikes.csv", title, "What", labels, {"Strikes": ("number", counts)}, 0)


def _nature(out: _Tables, read: Reader) -> None:
    birds = [r for r in read("penguins.json") if r["Body Mass (g)"] and r["Sex"] in ("MALE", "FEMALE")]
    species = ("Adelie", "Chinstrap", "Gentoo")
    for sex in ("MALE", "FEMALE"):
        of = {s: [r for r in birds if r["Species"] == s and r["Sex"] == sex] for s in species}
        out.add(
            "groups", "penguins.json", f"{sex.title()} penguins", "Species", species,
            {
                "Weight": ("kg", [fmean(r["Body Mass (g)"] for r in of[s]) / 1000 for s in species]),
                "Beak": ("mm", [fmean(r["Beak Length (mm)"] for r in of[s]) for s in species]),
            },
        )  # fmt: skip
    for island in ("Biscoe", "Dream"):
        counts = {s: sum(r["Species"] == s and r["Island"] == island for r in birds) for s in species}
        counts = {s: n for s, n in counts.items() if n}
        first, other = counts
        males = sum(r["Island"] == island and r["Species"] == other and r["Sex"] == "MALE" for r in birds)
        out.add(
            "parts", "penguins.json", f"{island} island", "Penguins",
            [first, f"{other[:6]} m", f"{other[:6]} f"],
            {"Share": ("percent", percents([counts[first], males, counts[other] - males]))}, 0,
        )  # fmt: skip
    for name in species:
        mine = sorted((r["Flipper Length (mm)"], r["Body Mass (g)"] / 1000) for r in birds if r["Species"] == name)
        mine = mine[:: max(1, len(mine) // 7)][:8]
        out.add(
            "pairs", "penguins.json", f"{name} penguins", "Bird", range(1, len(mine) + 1),
            {"Flipper": ("mm", [f for f, _ in mine]), "Weight": ("kg", [m for _, m in mine])},
        )  # fmt: skip
    by_year: dict[int, list[float]] = defaultdict(list)
    by_month: dict[tuple[int, int], float] = {}
    for row in read("co2-concentration.csv"):
        by_year[int(row["Date"][:4])].append(float(row["CO2"]))
        by_month[int(row["Date"][:4]), int(row["Date"][5:7])] = float(row["CO2"])
    for title, years in {"CO2 in the air": range(1965, 2016, 10), "Carbon dioxide": range(1960, 2011, 10)}.items():
        out.add(
            "series",
            "co2-concentration.csv",
            title,
            "Year",
            years,
            {"CO2": ("ppm", [fmean(by_year[y]) for y in years])},
        )
    out.add(
        "series", "co2-concentration.csv", "CO2 by month", "Month", [MONTHS[m - 1] for m in range(2, 13, 2)],
        {str(y): ("ppm", [by_month[y, m] for m in range(2, 13, 2)]) for y in (1970, 2010)}, 0,
    )  # fmt: skip
    warm = {int(r["year"]): float(r["temp"]) for r in read("global-temp.csv")}
    for title, years in {"Global warming": range(1985, 2021, 7), "Warmer than before": range(1983, 2019, 5)}.items():
        out.add("series", "global-temp.csv", title, "Year", years, {"Above": ("Celsius", [warm[y] for y in years])}, 2)
    states = {r["state"]: r for r in read("population_engineers_hurricanes.csv")}
    names = ("Alabama", "Florida", "Georgia", "Louisiana", "Texas", "New York", "Virginia")
    out.add(
        "groups", "population_engineers_hurricanes.csv", "Hurricanes", "State", names,
        {"Storms": ("number", [float(states[s]["hurricanes"]) for s in names])}, 0,
    )  # fmt: skip
    for title, listed in {
        "State populations": "Texas Florida Ohio Iowa Maine Nevada Utah Oregon",
        "People by state": "California Illinois Georgia Indiana Kansas Idaho Hawaii",
    }.items():
        out.add(
            "groups", "population_engineers_hurricanes.csv", title, "State", listed.split(),
            {
                "People": ("millions", [float(states[s]["population"]) / 1e6 for s in listed.split()]),
                "Experts": ("per 1000", [float(states[s]["engineers"]) * 1000 for s in listed.split()]),
            },
        )  # fmt: skip


def _past(out: _Tables, read: Reader) -> None:
    wheat = {int(r["year"]): r for r in read("wheat.json")}
    for title, years in {
        "Wheat and wages": range(1570, 1621, 10),
        "Price of wheat": range(1625, 1676, 10),
        "Wheat in England": range(1680, 1731, 10),
        "Grain prices": range(1735, 1771, 5),
        "Cost of wheat": range(1775, 1811, 5),
    }.items():
        out.add(
            "series", "wheat.json", title, "Year", years,
            {
                "Wheat": ("shillings", [float(wheat[y]["wheat"]) for y in years]),
                "Wages": ("shillings", [float(wheat[y]["wages"]) for y in years]),
            },
            0 if title != "Wheat and wages" else 1,
        )  # fmt: skip
    reigns = {r["name"]: r["end"] - r["start"] for r in read("monarchs.json") if "commonwealth" not in r}
    for title, names in {
        "Reigns": ("James I", "Charles I", "Charles II", "Anne", "George I"),
        "Years as king": ("James I", "Charles I", "James II", "George I", "George II", "George III"),
    }.items():
        out.add("groups", "monarchs.json", title, "Monarch", names, {"Reign": ("years", [reigns[n] for n in names])}, 0)


def _economy(out: _Tables, read: Reader) -> None:
    rows = {int(r["YEAR"]): r for r in read("longley")}
    for title, key, name, unit, scale in (
        ("US work force", "TOTEMP", "Employed", "millions", 1e3),
        ("US output", "GNP", "Output", "billions", 1e3),
        ("Soldiers", "ARMED", "Soldiers", "millions", 1e3),
        ("US people", "POP", "People", "millions", 1e3),
        ("Without work", "UNEMP", "Jobless", "thousands", 1.0),
    ):
        years = range(1948, 1963, 2)
        out.add("series", "longley", title, "Year", years, {name: (unit, [float(rows[y][key]) / scale for y in years])})
    quarters: dict[int, list[Row]] = defaultdict(list)
    for row in read("macrodata"):
        quarters[int(row["year"])].append(row)
    for title, key, name, unit, scale, years in (
        ("US unemployment", "unemp", "Rate", "percent", 1.0, range(1960, 2009, 8)),
        ("Jobless rate", "unemp", "Rate", "percent", 1.0, range(1982, 2009, 4)),
        ("US consumption", "realcons", "Spent", "trillions", 1e3, range(1960, 2009, 8)),
        ("US growth", "realgdp", "GDP", "trillions", 1e3, range(1965, 2006, 8)),
        ("Consumer prices", "cpi", "Index", "points", 1.0, range(1960, 2009, 8)),
        ("Interest rates", "tbilrate", "Rate", "percent", 1.0, range(1962, 2005, 6)),
        ("US population", "pop", "People", "millions", 1.0, range(1962, 2009, 9)),
    ):
        out.add(
            "series", "macrodata", title, "Year", years,
            {name: (unit, [fmean(float(q[key]) for q in quarters[y]) / scale for y in years])},
        )  # fmt: skip
    for year in (1965, 1985, 2005):
        keys = {"Consumers": "realcons", "Investment": "realinv", "State": "realgovt"}
        shares = [fmean(float(q[k]) for q in quarters[year]) for k in keys.values()]
        out.add(
            "parts", "macrodata", f"US spending {year}", "Who", ["People", "Firms", "State"],
            {"Share": ("percent", percents(shares))}, 0,
        )  # fmt: skip


def _sky_and_sea(out: _Tables, read: Reader) -> None:
    nile = {int(r["year"]): float(r["volume"]) for r in read("nile")}
    for title, start in {"Flow of the Nile": 1871, "Nile": 1899, "Nile at Aswan": 1923, "Nile water": 1946}.items():
        years = range(start, start + 24, 4)
        out.add("series", "nile", title, "Year", years, {"Flow": ("cubic km", [nile[y] / 10 for y in years])}, 0)
    spots = {int(float(r["YEAR"])): float(r["SUNACTIVITY"]) for r in read("sunspots")}
    for title, start in {"Sunspots": 1749, "Spots on the sun": 1848, "Solar activity": 1904, "Sun cycle": 1996}.items():
        years = range(start, start + 12, 2)
        out.add("series", "sunspots", title, "Year", years, {"Spots": ("number", [spots[y] for y in years])}, 0)
    sea = {int(float(r["YEAR"])): r for r in read("elnino")}
    for title, pair in {
        "Pacific Ocean": (1955, 1983),
        "Sea temperature": (1972, 1998),
        "El Nino": (1985, 1997),
    }.items():
        months = MONTHS[::2]
        out.add(
            "series", "elnino", title, "Month", months,
            {str(y): ("Celsius", [float(sea[y][m.upper()]) for m in months]) for y in pair},
        )  # fmt: skip


def _states(out: _Tables, read: Reader) -> None:
    rows = {r["state"].strip(): r for r in read("statecrime")}
    for title, key, name, of in (
        ("High school", "hs_grad", "Finished", "Texas Ohio Iowa Utah Maine Nevada Florida"),
        ("School graduates", "hs_grad", "Finished", "Alaska Georgia Hawaii Kansas Oregon Wyoming"),
        ("City dwellers", "urban", "In cities", "Texas Ohio Iowa Utah Maine Nevada Vermont"),
        ("Town and country", "urban", "In towns", "Alabama Alaska Arizona Idaho Illinois Montana"),
    ):
        states = of.split()
        out.add(
            "groups", "statecrime", title, "State", states, {name: ("percent", [float(rows[s][key]) for s in states])}
        )
