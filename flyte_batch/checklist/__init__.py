"""Whether a workflow is ready for production: a list of checks over what its environments and tasks say of themselves.

`workflow` describes a workflow file's Flyte objects, `code` looks into its functions, `findings` is what checks give.
The checks lie beside them, an area or two a module; `all_checks` goes through them. Nothing here imports Flyte.
"""
