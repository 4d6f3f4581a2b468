"""The style of pages: light and dark, from a phone to paper; no script, no font, nothing from elsewhere."""

from __future__ import annotations

LIGHT = {
    "back": "#f5f6f8", "panel": "#ffffff", "text": "#1b1f24", "dim": "#59636e", "line": "#d5dae0",
    "green": "#0a7436", "yellow": "#8a5000", "red": "#b00020", "blue": "#1a5bb8",
}  # fmt: skip
DARK = {
    "back": "#12151a", "panel": "#1b1f26", "text": "#e6e9ed", "dim": "#a2abb6", "line": "#373e48",
    "green": "#56cf85", "yellow": "#e3b04b", "red": "#ff8c82", "blue": "#79b0ff",
}  # fmt: skip
"""Colours by their use. Each text colour has a contrast of at least 4.5 to `back` and `panel`: a test computes it."""


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--kc-{name}:{colour};" for name, colour in colours.items())


_RULES = """\
.kc,.kc *{box-sizing:border-box}
.kc{color:var(--kc-text);background:var(--kc-back);font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere;\
-webkit-text-size-adjust:100%}
body.kc{margin:0}
.kc-main{max-width:68rem;margin:auto;padding:1.5rem}
div.kc>.kc-main{padding:1rem}
.kc h1{font-size:1.6rem;line-height:1.25;margin:0 0 .25rem}
.kc h2{font-size:1.15rem;margin:2rem 0 .6rem}
.kc h3{font-size:.95rem;margin:1rem 0 .2rem}
.kc p{margin:.3rem 0;max-width:80ch}
.kc small,.kc .kc-note,.kc dt,.kc th{color:var(--kc-dim);font-weight:400;font-size:.87rem}
.kc code,.kc ul,.kc section[class]>h3{font-size:.87rem;\
font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.kc-green{--kc-mark:var(--kc-green)}.kc-yellow{--kc-mark:var(--kc-yellow)}.kc-red{--kc-mark:var(--kc-red)}
.kc-blue{--kc-mark:var(--kc-blue)}.kc-dim{--kc-mark:var(--kc-dim)}
:where(.kc) :is(details,section,.kc-bars>div):where(:not([class])){--kc-mark:initial}
.kc-cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));gap:.75rem;margin:1.2rem 0}
.kc-cards>div{background:var(--kc-panel);border:1px solid var(--kc-line);border-top:4px solid \
var(--kc-mark,var(--kc-line));border-radius:8px;padding:.7rem .9rem}
.kc-cards b{display:block;font-size:1.35rem;line-height:1.3;color:var(--kc-mark,inherit)}
.kc dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:.1rem 1.2rem;margin:.5rem 0}
.kc dd{margin:0}
.kc dl>div{display:flex;gap:.6rem}
.kc dl>div dt{flex:0 0 6rem}
.kc-main>dl:last-child{margin-top:2rem;border-top:1px solid var(--kc-line);padding-top:.8rem}
.kc section[class]{border-left:3px solid var(--kc-mark);padding-left:.8rem;margin:.6rem 0}
.kc h3 .kc-note{font-family:system-ui,sans-serif}
.kc dl.kc-pairs{gap:.5rem}
.kc dl.kc-pairs>div{display:block;border:1px solid var(--kc-line);border-radius:6px;padding:.3rem .6rem;\
background:var(--kc-back)}
.kc details,.kc-panel{background:var(--kc-panel);border:1px solid var(--kc-line);border-left:4px solid \
var(--kc-mark,var(--kc-line));border-radius:8px;margin:.5rem 0;padding:.55rem .9rem}
.kc summary{cursor:pointer;display:grid;grid-template-columns:1rem minmax(9rem,16rem) 1fr;gap:.1rem .6rem;\
align-items:baseline;list-style:none}
.kc summary::-webkit-details-marker{display:none}
.kc summary::before{content:"\\25B8";color:var(--kc-dim)}
.kc details[open]>summary::before{content:"\\25BE"}
.kc summary b{color:var(--kc-mark,inherit)}
.kc summary:focus-visible,.kc-scroll:focus-visible{outline:3px solid var(--kc-blue);outline-offset:2px}
.kc details>div{margin-top:.5rem;border-top:1px solid var(--kc-line);padding-top:.3rem}
.kc ul{list-style:none;margin:.4rem 0;padding:0;columns:2 24rem;column-gap:1.5rem}
.kc li{break-inside:avoid}
.kc-scroll{overflow-x:auto}
.kc table{border-collapse:collapse;width:100%;margin:.4rem 0}
.kc th,.kc td{text-align:left;vertical-align:top;padding:.25rem 1.2rem .25rem 0;border-bottom:1px solid var(--kc-line);\
overflow-wrap:break-word}
.kc caption{text-align:left;padding:.2rem 0}
.kc [style*=right]{white-space:nowrap}
.kc .kc-right{text-align:right;font-variant-numeric:tabular-nums}
.kc-bars{margin:.4rem 0;display:grid;grid-template-columns:minmax(8rem,20rem) 1fr auto;gap:.1rem .8rem}
.kc-bars>*{grid-column:1/-1}
.kc-bars>div{display:grid;grid-template-columns:subgrid;align-items:center;padding:.2rem 0}
.kc-bars>h3{font-family:inherit}
.kc-bars .kc-bar{position:relative;height:1rem;background:var(--kc-back);border:1px solid var(--kc-line);\
border-radius:3px}
.kc-bars i{position:absolute;left:0;top:0;bottom:0;border-radius:2px;background:var(--kc-mark,var(--kc-blue));\
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.kc-bars s{position:absolute;top:-4px;bottom:-4px;width:2px;background:var(--kc-text);print-color-adjust:exact}
.kc-bars .kc-value{text-align:right;font-variant-numeric:tabular-nums}
.kc-bars small{display:block}
@media(max-width:600px){
.kc-main{padding:.9rem}.kc h1{font-size:1.35rem}.kc-cards{grid-template-columns:1fr 1fr;gap:.5rem}
.kc summary{grid-template-columns:1rem 1fr}.kc summary .kc-note{grid-column:2}
.kc-bars{grid-template-columns:1fr auto}.kc-bars .kc-label{grid-column:1/-1}
.kc details,.kc-panel{padding:.5rem .6rem}.kc th,.kc td{padding-right:.6rem}
}
@media print{
.kc{background:#fff;font-size:10pt}.kc-main{max-width:none;padding:0}
.kc details::details-content{content-visibility:visible;block-size:auto}
.kc details,.kc-cards>div,.kc-panel{break-inside:auto;border-radius:0}
.kc summary,.kc h2,.kc h3{break-after:avoid}.kc details>summary::before{content:""!important}
.kc ul{columns:2}.kc td{overflow-wrap:anywhere}
}
"""

STYLE = (
    f".kc{{{_variables(LIGHT)}color-scheme:light}}"
    f"@media screen and (prefers-color-scheme:dark){{.kc{{{_variables(DARK)}color-scheme:dark}}}}\n{_RULES}"
)
"""The style sheet: it applies only within elements of the class `kc`, so that a notebook can hold it."""
