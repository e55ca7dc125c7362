"""Pictures of a timeline: SVG and PNG charts, a text grid, Perfetto traces."""
