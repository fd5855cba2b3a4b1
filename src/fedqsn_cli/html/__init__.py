"""Pages for a browser: one file each, nothing fetched, no script; sharp on paper too.

pages.py          pages from templates
frame.html.j2     what every page has
parts.html.j2     sections, figures, tables, keys of plots
charts.py         plots as inline SVG
page.css          how all of it looks
"""
