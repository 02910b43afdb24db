"""All but the compiled part is in pyproject.toml. Without a compiler the package is installed without it."""

import sysconfig

from setuptools import Extension, setup

# The compiled part knows nothing of Python: one is for all versions. (Free-threaded ones have no name for such a one.)
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            "lightning_speedlimit.trajectory._rows",
            ["lightning_speedlimit/trajectory/rows.c"],
            # Roots are of numbers ≥ 0; a product and a sum are rounded each, as elsewhere.
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"],
            libraries=["m"],
            optional=True,
            py_limited_api=LIMITED,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
)
