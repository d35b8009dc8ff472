// Ctrl+Enter (Command+Enter) makes what the open tab shows; an example does so too, once it stands in the prompt.
window.ldm2Make = () => {
  const button = [...document.querySelectorAll('.ldm2-make')].find(each => each.offsetParent && !each.disabled);
  if (button) button.click();
};
document.addEventListener('keydown', event => {
  if ((event.ctrlKey || event.metaKey) && event.key === 'Enter') {
    event.preventDefault();
    window.ldm2Make();
  }
}, true);
// One sound at a time.
document.addEventListener('play', event => {
  document.querySelectorAll('audio').forEach(each => { if (each !== event.target) each.pause(); });
}, true);
// What went wrong is not left below or above the part of the page that is seen.
new MutationObserver(changes => {
  for (const change of changes) {
    const error = change.target.querySelector && change.target.querySelector('.ldm2-error');
    if (error && error.offsetParent) error.scrollIntoView({block: 'nearest'});
  }
}).observe(document.documentElement, {childList: true, subtree: true});
