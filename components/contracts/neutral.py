"""The modules that a step may import and whose code is not part of its content key: they cannot change what it makes.

They serve whoever watches a step, and what becomes of its process. A module belongs here when no edit of it that keeps
its tests green could change a byte of a finished step's output; one that a step could do without belongs out of the
step's imports instead. It imports the standard library, pydantic, psutil and modules of this list (a test), so that
nothing else comes along. Everything that is not named here counts, new modules too.
"""

NEUTRAL = frozenset(
    {
        "nvila.components.contracts.children",  # ends a child process with its parent
        "nvila.components.contracts.environment",  # where things are; `resolve.external` names what reaches an output
        "nvila.components.contracts.errors",  # what a step says that makes no output
        "nvila.components.contracts.exits",  # the number that it then ends with
        "nvila.components.contracts.neutral",
        "nvila.components.contracts.pipelines",  # tables of rows, as `steps`
        "nvila.components.contracts.places",  # refuses a folder
        "nvila.components.contracts.progress",  # how far it is
        "nvila.components.contracts.surroundings",  # short names for sockets, a home, a way round the proxy
        # The forms of what steps find out compute nothing (a test): what is filled in, and how, stands in the step.
        "nvila.components.contracts.results",
        "nvila.components.contracts.results.accuracy",
        "nvila.components.contracts.results.model",
        "nvila.components.contracts.results.result",
        "nvila.components.contracts.results.run",
        "nvila.components.contracts.site",  # what jobs ask of a cluster
        "nvila.components.contracts.steps",  # what a row says is settings and inputs of steps, or in `resolve.external`
        "nvila.components.contracts.text",  # a line on stderr
        "nvila.components.tracking.redact",  # without secrets; of outputs only the report's page, which is always made
        "nvila.components.tracking.tokens",
    }
)
