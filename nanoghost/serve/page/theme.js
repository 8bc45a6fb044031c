// Runs before the first paint, so that a dark page does not flash white.
const storedTheme = localStorage.getItem("nanoghost-theme");
if (storedTheme) document.documentElement.dataset.theme = storedTheme;
