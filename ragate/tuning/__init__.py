"""The data that judges are trained on, as code: public labelled data in, lessons in ragas' own words out.

The data itself is in neither the repository nor the wheel. `ragate.tuning.recipe.build` makes the lessons (and imports
ragas, which takes seconds), `ragate.tuning.examples` makes token ids of them.
"""
