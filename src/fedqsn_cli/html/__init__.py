"""Pages for a browser: one file each, nothing fetched, no script; sharp on paper too.

parts.py    the frame, sections, tables, keys of plots
charts.py   plots as inline SVG
page.css    how all of it looks
"""
