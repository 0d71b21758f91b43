"""The report of a run: figures as SVG and tables as HTML, in one page without outside links."""
