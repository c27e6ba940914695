"""The page around a report: one HTML document without scripts, fonts or anything else to load."""

CSS = """
:root { color-scheme: light dark;
  --page: #ffffff; --card: #f7f8fa; --ink: #1d2026; --muted: #69707d; --grid: #e4e7ec;
  --accent: #2b66d9; --second: #c2760c; --right: #15803d; --wrong: #c0312b;
  --rollout: #5b8ff0; --reward: #3fa66b; --train: #e2b03a; --push: #a878d8; --other: #b4bac4; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14161a; --card: #1c1f25; --ink: #e4e6ea; --muted: #949ba8; --grid: #2c3038;
  --accent: #78a9ff; --second: #eda94a; --right: #5cc98a; --wrong: #f2827b;
  --rollout: #5b8ff0; --reward: #4fb57b; --train: #d9aa3c; --push: #a878d8; --other: #5d6470; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
    "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 48px 28px 72px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 52px 0 4px; letter-spacing: -0.005em; }
h2 + p { margin: 0 0 18px; color: var(--muted); max-width: 100ch;
  } h2 + .command { margin-top: 12px; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 26px; margin: 0; color: var(--muted);
  font-size: 14px; }
.facts b { color: var(--ink); font-weight: 500; }
.outcome { font-size: 20px; line-height: 1.5; margin: 28px 0 24px; max-width: 72ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; }
.tile { background: var(--card); border-radius: 10px; padding: 14px 16px; }
.tile span { display: block; font-size: 13px; color: var(--muted); }
.tile strong { display: block; font-size: 19px; font-weight: 600; line-height: 1.6;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.plots { display: grid; gap: 26px 30px; grid-template-columns: repeat(3, minmax(0, 1fr)); }
.plots.pair { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.plots.one { grid-template-columns: minmax(0, 1fr); margin-top: 26px; }
figure { margin: 0; break-inside: avoid; min-width: 0; }
figcaption { display: flex; gap: 8px; align-items: baseline; font-size: 14px; margin-bottom: 4px; }
figcaption b { font-weight: 600; white-space: nowrap; }
figcaption span { color: var(--muted); font-size: 12.5px; flex: 1; min-width: 0; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
figcaption output { font-variant-numeric: tabular-nums; white-space: nowrap; }
svg { display: block; overflow: visible; width: 100%; height: auto; }
.plots.one figure { overflow-x: auto; } .plots.one svg { min-width: 640px; }
.question { font-weight: 600; margin: 26px 0 10px; white-space: pre-wrap; overflow-wrap: anywhere; }
.question small { font-weight: 400; color: var(--muted); font-size: 14px; margin-left: 8px; }
.samples { display: grid; gap: 14px; grid-template-columns: repeat(3, minmax(0, 1fr)); }
.moment { font-size: 13px; color: var(--muted); margin: 0 0 6px; }
.sample { background: var(--card); border-radius: 10px; padding: 12px 16px; font-size: 14px;
  border-top: 3px solid var(--wrong); break-inside: avoid; margin-bottom: 14px; }
.sample.right { border-color: var(--right); }
.sample header { display: flex; flex-wrap: wrap; gap: 2px 12px; color: var(--muted);
  font-size: 13px; }
.verdict { font-weight: 600; color: var(--wrong); } .right .verdict { color: var(--right); }
.response { margin: 8px 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 22em;
  overflow-y: auto; font: 13px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.response i { font-style: normal; color: var(--muted); }
.response b { font-weight: 600; color: var(--wrong); } .right .response b { color: var(--right); }
.sample footer { color: var(--muted); font-size: 13px; overflow-wrap: anywhere; }
details { margin-top: 52px; } summary { font-size: 19px; font-weight: 600; cursor: pointer; }
.settings { columns: 2; column-gap: 40px; margin-top: 14px; font-size: 14px; }
.settings table { width: 100%; border-collapse: collapse; break-inside: avoid;
  margin-bottom: 18px; }
.settings th { text-align: left; padding: 3px 0; font-weight: 600; }
.settings td { padding: 3px 0; border-top: 1px solid var(--grid); vertical-align: top; }
.settings td + td { text-align: right; padding-left: 16px; overflow-wrap: anywhere;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 13px; }
.settings td:first-child { color: var(--muted); white-space: nowrap; }
.command { margin: 0 0 14px; } .command p { margin: 0 0 4px; font-size: 14px; color: var(--muted); }
pre { margin: 0; padding: 10px 14px; border-radius: 8px; background: var(--card); overflow-x: auto;
  font: 13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 820px) { main { padding: 28px 18px 48px; }
  .plots, .plots.pair, .samples { grid-template-columns: minmax(0, 1fr);
    } .settings { columns: 1; } }
@media print { :root { color-scheme: light;
    --page: #ffffff; --card: #f7f8fa; --ink: #1d2026; --muted: #5c636f; --grid: #e4e7ec;
    --accent: #2b66d9; --second: #c2760c; --right: #15803d; --wrong: #c0312b; }
  body { font-size: 12px; } main { padding: 0; max-width: none; }
  .response { max-height: none; } h2 { break-after: avoid; margin-top: 30px; }
  .plots { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .plots.pair { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .samples { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def page(title: str, body: str) -> str:
    """The whole document. title: already escaped."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
