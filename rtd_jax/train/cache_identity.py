"""What a recipe's teacher cache must have been written with."""

from pathlib import Path

from rtd_jax.methods.maps import layers_of
from rtd_jax.models.open import OpenModel
from rtd_jax.teacher.cache import served_model
from rtd_jax.teacher.identity import AS_SERVED, SERVED, Identity
from rtd_jax.train.recipe import Recipe


def cache_identity(recipe: Recipe, teacher: OpenModel) -> Identity:
    """What a teacher cache must have been written with, for this recipe to read it.

    Raises:
      ValueError: the recipe names a layer that the teacher does not have, or the folder holds the cache of a server,
        and the recipe does not say so.
    """
    chosen = layers_of(sorted(recipe.loss.teacher_layers(teacher.config)))
    try:
        others = [teacher.config.layer_index(other) for other in recipe.cache.layers]
    except ValueError as error:
        raise ValueError(f"cache.layers is {recipe.cache.layers}: {error}") from error
    return Identity(
        teacher=teacher_fingerprint(recipe, teacher),
        teacher_dtypes=AS_SERVED if recipe.is_served else recipe.teacher.precision,
        tokenizer=teacher.tokenizer_fingerprint,
        vocab_size=teacher.vocab_size,
        width=teacher.config.width,
        hidden_layers=chosen,
        temperature=recipe.loss.temperature,
        top_k=min(recipe.cache.top_k, teacher.vocab_size),
        predictions=recipe.cache.predictions,
        states=recipe.cache.states if recipe.has_states else "none",
        layers=tuple(sorted({*chosen, *others})),
        step_state=recipe.loss.step_state if recipe.has_states else "end",
    )


def teacher_fingerprint(recipe: Recipe, teacher: OpenModel) -> str:
    """What the teacher is known by: the fingerprint of its weights, or "served:" and its name on a server.

    Raises:
      ValueError: there are no weights; or the recipe's cache was filled by a server, and the recipe does not say so.
    """
    if recipe.is_served:
        return SERVED + recipe.teacher.served_model
    served = served_model(Path(recipe.teacher.cache).expanduser()) if recipe.teacher.cache else ""
    if served:
        raise ValueError(
            f"the teacher cache {recipe.teacher.cache} was filled by the server of a model {served!r}, and has no "
            f"hidden states; set teacher.served_model={served} to train from it, by logit matching alone"
        )
    return teacher.fingerprint
